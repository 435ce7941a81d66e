"""Deformable RoI pooling v1 and v2; semantics and contracts of mmdeform.ops.deform_roi_pool."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmdeform.ops import deform_roi_pool, deform_roi_pool_reference

from .contracts import OperatorContract
from .contracts.operator import TYPES, Arguments, Case, off_integer_lines


def make_rois(
    count: int, images: int, size: tuple[int, int], bins: tuple[int, int], spatial_scale: float
) -> Tensor:
    """RoIs in no order of images, of 0.15 to 2.85 pixels per bin; some reach outside."""
    axes = []
    for extent, bin_count in ((size[1], bins[1]), (size[0], bins[0])):
        # Adaptive grids change where a bin's size is an integer.
        length = bin_count * off_integer_lines(count, low=0, high=2)
        start = (extent + 2) * torch.rand(count, dtype=torch.float64) - 2 - length / 4
        axes.append(torch.stack([start, start + length], 1))
    corners = (torch.stack(axes, 2).flatten(1) + 0.5) / spatial_scale
    image = torch.randint(max(images, 1), (count, 1), dtype=torch.float64)
    return torch.cat([image, corners], 1)


def make(
    images: int = 2,
    channels: int = 5,
    size: tuple[int, int] = (7, 9),
    rois: int = 6,
    output_size: tuple[int, int] = (3, 2),
    spatial_scale: float = 0.25,
    sampling_ratio: int = 2,
    gamma: float = 0.3,
    offset: bool = True,
    mask: bool = True,
) -> Arguments:
    """Random arguments; bins move by up to a few pixels, so some samples lie outside."""
    double = {"dtype": torch.float64}
    return {
        "input": torch.randn(images, channels, *size, **double),
        "rois": make_rois(rois, images, size, output_size, spatial_scale),
        "offset": torch.randn(rois, 2, *output_size, **double) if offset else None,
        "output_size": output_size,
        "spatial_scale": spatial_scale,
        "sampling_ratio": sampling_ratio,
        "gamma": gamma,
        "mask": torch.rand(rois, *output_size, **double) + 0.2 if mask else None,
    }


def case(emulated: bool = True, **geometry: Any) -> Case:
    return Case(lambda: make(**geometry), emulated)


CASES = {
    # Unsorted images, bins that are not square, odd numbers of everything.
    "asymmetric": case(),
    "tiny": case(channels=2, size=(4, 5), rois=4),
    "v1": case(mask=False),
    "mask-without-offset": case(offset=False),
    "plain": case(offset=False, mask=False),
    "adaptive": case(sampling_ratio=0),
    "adaptive-plain": case(sampling_ratio=0, offset=False, mask=False),
    "1-sample": case(sampling_ratio=1),
    "5-samples": case(sampling_ratio=5),
    "1-bin": case(output_size=(1, 1), sampling_ratio=0),
    "1x7-bins": case(output_size=(1, 7)),
    "7x7-bins": case(output_size=(7, 7), rois=2),
    "1-roi": case(rois=1, images=1),
    "no-roi": case(rois=0),
    "no-image": case(images=0, rois=0),
    "1-image": case(images=1),
    "33-images": case(images=33, size=(3, 4)),
    "images-without-rois": case(images=9, rois=2),
    "full-size": case(spatial_scale=1.0),
    "row-of-pixels": case(size=(1, 9)),
    "column-of-pixels": case(size=(9, 1)),
    "1-channel": case(channels=1),
    "16-channels": case(channels=16),
    "33-channels": case(channels=33, rois=3),
    "65-channels": case(channels=65, rois=3),
    "256-channels": case(False, channels=256, output_size=(7, 7), size=(25, 21)),
    "many-rois": case(False, channels=24, rois=67, size=(25, 42), sampling_ratio=0),
}


class TestContract(OperatorContract):
    name = "deform_roi_pool"
    data = ("input",)
    coordinates = ("offset", "mask")
    boxes = ("rois",)
    backward_returns = ("input", "offset", "mask")
    cases = CASES

    @staticmethod
    def schema_arguments(arguments: Arguments) -> tuple:
        keys = ("input", "rois", "offset", "mask", "output_size", "spatial_scale",
                "sampling_ratio", "gamma")  # fmt: skip
        values = [arguments[key] for key in keys]
        return (*values[:4], list(values[4]), *values[5:])

    def sized(self, size: int) -> Arguments:
        # No two sizes are equal that differ in general: torch.compile would tie them together.
        return make(images=3 + size, rois=7 + 4 * size, size=(15 + 2 * size, 30 + 3 * size))

    def contended(self) -> Arguments:
        """Every RoI at about the same place, in no order of images."""
        arguments = make(channels=64, rois=61, size=(16, 17), output_size=(7, 7))
        arguments["rois"][:, 1:] = torch.tensor([8.0, 6, 60, 55])
        return arguments


def brute_force(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    mask: Tensor | None,
) -> Tensor:
    """One sample after another; every pixel weighted by the tents over its rows and columns."""
    height, width = input.shape[2:]
    output = torch.zeros(len(rois), input.shape[1], *output_size, dtype=torch.float64)
    for r, (image, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (value * spatial_scale - 0.5 for value in box)
        bin_w, bin_h = (x2 - x1) / output_size[1], (y2 - y1) / output_size[0]
        grid_w, grid_h = (sampling_ratio or math.ceil(size) for size in (bin_w, bin_h))
        for ph in range(output_size[0]):
            for pw in range(output_size[1]):
                left, top = x1 + pw * bin_w, y1 + ph * bin_h
                if offset is not None:
                    left += gamma * (x2 - x1) * offset[r, 0, ph, pw].item()
                    top += gamma * (y2 - y1) * offset[r, 1, ph, pw].item()
                for iy in range(grid_h):
                    for ix in range(grid_w):
                        y = top + (iy + 0.5) * bin_h / grid_h
                        x = left + (ix + 0.5) * bin_w / grid_w
                        if y < -1 or y > height or x < -1 or x > width:
                            continue
                        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
                        for i in range(height):
                            for j in range(width):
                                tent = max(0, 1 - abs(y - i)) * max(0, 1 - abs(x - j))
                                if tent:
                                    output[r, :, ph, pw] += tent * input[int(image), :, i, j]
                output[r, :, ph, pw] /= max(grid_h * grid_w, 1)
                if mask is not None:
                    output[r, :, ph, pw] *= mask[r, ph, pw]
    return output


@pytest.mark.parametrize(
    "name", ["asymmetric", "adaptive", "v1", "mask-without-offset", "plain", "row-of-pixels"]
)
def test_reference_equals_brute_force(name: str) -> None:
    arguments = CASES[name].make()
    expected = brute_force(**arguments)
    assert expected.std() > 0.15
    actual = deform_roi_pool_reference(*TestContract.schema_arguments(arguments))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def run(arguments: Arguments) -> dict[str, Tensor]:
    """Output and gradients of its sum."""
    leaves = {
        key: arguments[key].detach().requires_grad_()
        for key in ("input", "offset", "mask")
        if arguments[key] is not None
    }
    output = deform_roi_pool(**{**arguments, **leaves})
    grads = torch.autograd.grad(output.sum(), list(leaves.values()))
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def place(arguments: Arguments, types: tuple, device: str) -> Arguments:
    return TestContract().place(arguments, types, device, requires_grad=False)


def sampled(
    height: int, width: int, positions: list[tuple[float, float]], device: str, types: str = "fp64"
) -> Arguments:
    """An image whose pixel (r, c) is 10 + 3 r + c, sampled at (row, column) ``positions``.

    One RoI of 2 x 2 pixels around each position, one bin, one sample in its middle; an offset of
    one moves it by one pixel.
    """
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = torch.tensor(positions, dtype=torch.float64).unbind(1)
    arguments = {
        "input": (10 + 3 * rows + columns).double()[None, None],
        "rois": torch.stack([0 * x, x - 0.5, y - 0.5, x + 1.5, y + 1.5], 1),
        "offset": torch.zeros(len(positions), 2, 1, 1, dtype=torch.float64),
        "output_size": (1, 1),
        "spatial_scale": 1.0,
        "sampling_ratio": 1,
        "gamma": 0.5,
        "mask": torch.ones(len(positions), 1, 1, dtype=torch.float64),
    }
    return place(arguments, TYPES[types], device)


# Inputs, output and gradient of the input of mmcv's own test: 2 x 2 bins, 2 samples, no offset.
PUBLISHED = [
    (
        [[[1, 2], [3, 4]]],
        1,
        [[[1, 1.25], [1.5, 1.75]]],
        [[[3.0625, 0.4375], [0.4375, 0.0625]]],
    ),
    (
        [[[1, 2], [3, 4]], [[4, 3], [2, 1]]],
        1,
        [[[1, 1.25], [1.5, 1.75]], [[4, 3.75], [3.5, 3.25]]],
        [[[3.0625, 0.4375], [0.4375, 0.0625]]] * 2,
    ),
    (
        [[[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]],
        3,
        [[[1.9375, 4.75], [7.5625, 10.375]]],
        [[
            [0.47265625, 0.4296875, 0.4296875, 0.04296875],
            [0.4296875, 0.390625, 0.390625, 0.0390625],
            [0.4296875, 0.390625, 0.390625, 0.0390625],
            [0.04296875, 0.0390625, 0.0390625, 0.00390625],
        ]],
    ),
]  # fmt: skip


@pytest.mark.emulated
@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize(("pixels", "corner", "output", "grad"), PUBLISHED)
def test_published_numbers(
    pixels: list, corner: int, output: list, grad: list, types: tuple, device: str
) -> None:
    arguments = {
        "input": torch.tensor(pixels).double()[None],
        "rois": torch.tensor([[0, 0, 0, corner, corner]]).double(),
        "offset": torch.zeros(1, 2, 2, 2).double(),
        "output_size": 2,
        "sampling_ratio": 2,
        "mask": None,
    }
    result = run(place(arguments, types, device))
    tolerance = 1e-6 if types[0] in (torch.float32, torch.float64) else 1e-2
    for key, expected in (("output", output), ("input", grad)):
        torch.testing.assert_close(
            result[key][0].double().cpu(), torch.tensor(expected).double(), rtol=tolerance, atol=0
        )


@pytest.mark.emulated
class TestArguments:
    def test_offsets_move_bins(self, device: str) -> None:
        """x first, in units of gamma times the RoI's width."""
        arguments = place(make(rois=1, images=1, mask=False), TYPES["fp64"], device)
        x1, _, x2, _ = arguments["rois"][0, 1:].tolist()
        moved = arguments["rois"] + torch.tensor([[0, 5, 0, 5, 0]], device=device)
        expected = deform_roi_pool(**{**arguments, "rois": moved, "offset": None})
        arguments["offset"][:, 0] = 5 / (x2 - x1) / arguments["gamma"]
        arguments["offset"][:, 1] = 0
        torch.testing.assert_close(deform_roi_pool(**arguments), expected, rtol=1e-9, atol=1e-9)

    def test_mask_is_used_as_it_is(self, device: str) -> None:
        v1 = place(make(mask=False), TYPES["fp32"], device)
        v2 = {**v1, "mask": torch.full_like(v1["offset"][:, 0], -2)}
        torch.testing.assert_close(deform_roi_pool(**v2), deform_roi_pool(**v1) * -2)

    def test_zero_rois_keep_a_graph(self, device: str) -> None:
        """As training on an image without proposals needs it."""
        arguments = TestContract().place(make(rois=0), TYPES["fp32"], device)
        output = deform_roi_pool(**arguments)
        assert output.shape == (0, 5, 3, 2)
        (output.sum() + arguments["input"].sum()).backward()
        assert torch.equal(arguments["input"].grad, torch.ones_like(arguments["input"]))
        assert arguments["offset"].grad.shape == (0, 2, 3, 2)
        assert arguments["mask"].grad.shape == (0, 3, 2)

    def test_no_channel(self, device: str) -> None:
        arguments = TestContract().place(make(channels=0), TYPES["fp32"], device)
        output = deform_roi_pool(**arguments)
        assert output.shape == (6, 0, 3, 2)
        output.sum().backward()
        assert not arguments["offset"].grad.any()

    def test_fraction_of_an_image_index_is_dropped(self, device: str) -> None:
        arguments = place(make(), TYPES["fp32"], device)
        expected = deform_roi_pool(**arguments)
        arguments["rois"][:, 0] += 0.75
        assert torch.equal(deform_roi_pool(**arguments), expected)

    @pytest.mark.parametrize("types", ["fp16", "bf16", "bf16-fp32"])
    def test_rois_stay_fp32_beside_half_data(self, types: str, device: str) -> None:
        """At 1333 pixels a bf16 RoI would be off by up to four."""
        arguments = sampled(1, 1400, [(0, 1333.375), (0, 1001.25)], device)
        arguments["input"][:] = torch.arange(1400, device=device) % 2
        expected = deform_roi_pool(**arguments)
        assert expected.flatten().tolist() == [0.625, 0.75]
        rois = arguments["rois"].float()
        half = place(arguments, TYPES[types], device)
        assert torch.equal(deform_roi_pool(**{**half, "rois": rois}).double(), expected)
        with torch.autocast(device, TYPES[types][0]):
            cast = deform_roi_pool(**place(arguments, TYPES["fp32"], device))
        assert cast.dtype == TYPES[types][0]
        assert torch.equal(cast.double(), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_sums_are_wider_than_16_bits(self, dtype: torch.dtype, device: str) -> None:
        """4096 bins of one pixel: a sum in bf16 would stop at 256, one in fp16 at 2048."""
        arguments = sampled(1, 1, [(0, 0)] * 4096, device)
        result = run(place(arguments, (dtype, dtype), device))
        assert result["input"].item() == 4096

    def test_integer_stands_for_a_pair(self, device: str) -> None:
        arguments = place(make(output_size=(3, 3)), TYPES["fp32"], device)
        expected = deform_roi_pool(**arguments)
        for size in (3, [3, 3]):
            assert torch.equal(deform_roi_pool(**{**arguments, "output_size": size}), expected)

    def test_defaults(self, device: str) -> None:
        arguments = place(
            make(output_size=(7, 7), spatial_scale=1.0, sampling_ratio=0, gamma=0.1, mask=False),
            TYPES["fp32"],
            device,
        )
        expected = deform_roi_pool(**arguments)
        short = (arguments[key] for key in ("input", "rois", "offset"))
        assert torch.equal(deform_roi_pool(*short), expected)


@pytest.mark.parametrize(
    ("geometry", "forward", "backward"),
    [
        ({}, 8 * 720 + 2 * 180, 16 * 720 + 2 * 180),
        ({"mask": False}, 8 * 720 + 180, 16 * 720 + 180),
        ({"mask": False, "offset": False}, 8 * 720 + 180, 8 * 720 + 180),
        ({"sampling_ratio": 3}, 8 * 1620 + 2 * 180, 16 * 1620 + 2 * 180),
        ({"sampling_ratio": 0}, 8 * 720 + 2 * 180, 16 * 720 + 2 * 180),
    ],
    ids=str,
)
def test_flops_equal_the_hand_count(geometry: dict, forward: int, backward: int) -> None:
    """6 RoIs x 5 channels x 3 x 2 bins = 180 values of 2 x 2 samples each."""
    arguments = TestContract().place(make(**geometry))
    with FlopCounterMode(display=False) as counter:
        output = deform_roi_pool(**arguments)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == backward

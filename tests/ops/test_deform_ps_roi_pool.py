"""Position-sensitive pooling; semantics and contracts of mmdeform.ops.deform_ps_roi_pool."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmdeform.ops import deform_ps_roi_pool, deform_ps_roi_pool_reference

from .contracts import OperatorContract
from .contracts.operator import TYPES, Arguments, Case

# RoIs are rounded to pixels of the image. With a scale that is no simple fraction no sample comes
# to lie at an edge, where it counts or not depending on the last bit.
SCALE = 0.2718


def make(
    images: int = 2,
    size: tuple[int, int] = (7, 9),
    rois: int = 6,
    output_size: tuple[int, int] = (3, 2),
    spatial_scale: float = SCALE,
    output_dim: int = 6,
    group_size: int = 2,
    part_size: int = 4,
    sample_per_part: int = 2,
    trans_std: float = 0.2,
    classes: int | None = 3,
) -> Arguments:
    """Random arguments; bins move by up to a few pixels, so some samples lie outside."""
    double = {"dtype": torch.float64}
    start = torch.rand(rois, 2, **double) * torch.tensor([size[1] + 3, size[0] + 3]) - 3
    corners = torch.cat([start, start + 1 + 6 * torch.rand(rois, 2, **double)], 1) / spatial_scale
    image = torch.randint(max(images, 1), (rois, 1), **double)
    offset = None
    if classes is not None:
        offset = torch.randn(rois, 2 * classes, part_size, part_size, **double)
    return {
        "input": torch.randn(images, output_dim * group_size**2, *size, **double),
        "rois": torch.cat([image, corners], 1),
        "offset": offset,
        "output_size": output_size,
        "spatial_scale": spatial_scale,
        "output_dim": output_dim,
        "group_size": group_size,
        "part_size": part_size,
        "sample_per_part": sample_per_part,
        "trans_std": trans_std,
    }


def case(emulated: bool = True, **geometry: Any) -> Case:
    return Case(lambda: make(**geometry), emulated)


CASES = {
    # Groups, parts and bins of different numbers; classes of two channels; unsorted images.
    "asymmetric": case(part_size=3),
    "tiny": case(size=(4, 5), rois=4, output_dim=2, classes=2, part_size=2),
    "no-trans": case(classes=None),
    "1-class": case(classes=1),
    "every-channel-a-class": case(classes=6),
    "more-parts-than-bins": case(part_size=5),
    "1-part": case(part_size=1),
    "1-group": case(group_size=1),
    "more-groups-than-bins": case(group_size=5),
    "3-groups": case(group_size=3, output_size=(3, 3), part_size=3),
    "1-sample": case(sample_per_part=1),
    "5-samples": case(sample_per_part=5),
    "1-bin": case(output_size=(1, 1)),
    "1x7-bins": case(output_size=(1, 7)),
    "r-fcn": case(output_size=(7, 7), group_size=7, part_size=7, sample_per_part=4, rois=3,
                  classes=1),
    "r-fcn-offsets": case(output_size=(7, 7), group_size=7, part_size=7, output_dim=2, rois=3,
                          classes=None),
    "1-roi": case(rois=1, images=1),
    "no-roi": case(rois=0),
    "no-roi-no-trans": case(rois=0, classes=None),
    "no-image": case(images=0, rois=0),
    "33-images": case(images=33, size=(3, 4)),
    "images-without-rois": case(images=9, rois=2),
    "row-of-pixels": case(size=(1, 9)),
    "column-of-pixels": case(size=(9, 1)),
    "1-channel": case(output_dim=1, classes=1),
    "16-channels": case(output_dim=16, classes=1),
    "33-channels": case(output_dim=33, rois=3),
    "81-channels": case(output_dim=81, classes=27, rois=2),
    "many-rois": case(False, output_dim=24, rois=67, size=(25, 42), output_size=(7, 7)),
}  # fmt: skip


class TestContract(OperatorContract):
    name = "deform_ps_roi_pool"
    data = ("input",)
    coordinates = ("offset",)
    boxes = ("rois",)
    backward_returns = ("input", "offset")
    cases = CASES

    @staticmethod
    def schema_arguments(arguments: Arguments) -> tuple:
        input, rois, offset, output_size, *numbers = arguments.values()
        return (input, rois, offset, list(output_size), *numbers)

    def sized(self, size: int) -> Arguments:
        # No two sizes are equal that differ in general: torch.compile would tie them together.
        return make(images=7 + size, rois=7 + 4 * size, size=(15 + 2 * size, 30 + 3 * size))

    def contended(self) -> Arguments:
        """Every RoI at about the same place, in no order of images."""
        arguments = make(output_dim=48, rois=61, size=(16, 17), output_size=(7, 7))
        arguments["rois"][:, 1:] = torch.tensor([8.0, 6, 60, 55])
        return arguments


def brute_force(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: tuple[int, int],
    spatial_scale: float,
    output_dim: int,
    group_size: int,
    part_size: int,
    sample_per_part: int,
    trans_std: float,
) -> Tensor:
    """One output after another; every pixel weighted by the tents over its rows and columns."""
    height, width = input.shape[2:]
    output = torch.zeros(len(rois), output_dim, *output_size, dtype=torch.float64)
    for r, c, ph, pw in torch.cartesian_prod(*map(torch.arange, output.shape)).tolist():
        # C's round(): halves away from zero.
        box = [math.copysign(math.floor(abs(v) + 0.5), v) for v in rois[r, 1:].tolist()]
        x1, y1 = (v * spatial_scale - 0.5 for v in box[:2])
        roi_w = max((box[2] + 1) * spatial_scale - 0.5 - x1, 0.1)
        roi_h = max((box[3] + 1) * spatial_scale - 0.5 - y1, 0.1)
        left, top = x1 + pw * roi_w / output_size[1], y1 + ph * roi_h / output_size[0]
        if offset is not None:
            part = (
                math.floor(ph / output_size[0] * part_size),
                math.floor(pw / output_size[1] * part_size),
            )
            k = c // (output_dim // (offset.shape[1] // 2))
            left += offset[(r, 2 * k, *part)].item() * trans_std * roi_w
            top += offset[(r, 2 * k + 1, *part)].item() * trans_std * roi_h
        gh = min(math.floor(ph * group_size / output_size[0]), group_size - 1)
        gw = min(math.floor(pw * group_size / output_size[1]), group_size - 1)
        pixels = input[int(rois[r, 0]), (c * group_size + gh) * group_size + gw]
        total, kept = 0.0, 0
        for i in range(sample_per_part):
            for j in range(sample_per_part):
                y = top + i * roi_h / output_size[0] / sample_per_part
                x = left + j * roi_w / output_size[1] / sample_per_part
                if x < -0.5 or x > width - 0.5 or y < -0.5 or y > height - 0.5:
                    continue
                kept += 1
                y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
                rows = (1 - (torch.arange(height) - y).abs()).clamp(min=0)
                columns = (1 - (torch.arange(width) - x).abs()).clamp(min=0)
                total += (rows.double() @ pixels @ columns.double()).item()
        output[r, c, ph, pw] = total / kept if kept else 0
    return output


@pytest.mark.parametrize(
    "name",
    ["asymmetric", "no-trans", "1-class", "every-channel-a-class", "more-parts-than-bins",
     "3-groups", "more-groups-than-bins", "1x7-bins", "5-samples", "row-of-pixels"],
)  # fmt: skip
def test_reference_equals_brute_force(name: str) -> None:
    arguments = CASES[name].make()
    arguments["rois"][:3, 1:] = arguments["rois"][:3, 1:].floor() + 0.5  # halves, also negative
    expected = brute_force(**arguments)
    assert expected.std() > 0.3
    actual = deform_ps_roi_pool_reference(*TestContract.schema_arguments(arguments))
    # Tents are computed in fp32 there.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def run(arguments: Arguments) -> dict[str, Tensor]:
    """Output and gradients of its sum."""
    leaves = {
        key: arguments[key].detach().requires_grad_()
        for key in ("input", "offset")
        if arguments[key] is not None
    }
    output = deform_ps_roi_pool(**{**arguments, **leaves})
    grads = torch.autograd.grad(output.sum(), list(leaves.values()))
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def place(arguments: Arguments, types: tuple, device: str) -> Arguments:
    return TestContract().place(arguments, types, device, requires_grad=False)


def sampled(
    height: int, width: int, positions: list[tuple[float, float]], device: str, types: str = "fp64"
) -> Arguments:
    """An image whose pixel (r, c) is 10 + 3 r + c, sampled at (row, column) ``positions``.

    One RoI of 2 x 2 pixels, one bin, one sample, which begins at -0.5; the offset moves it.
    """
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = torch.tensor(positions, dtype=torch.float64).unbind(1)
    arguments = {
        "input": (10 + 3 * rows + columns).double()[None, None],
        "rois": torch.tensor([[0.0, 0, 0, 1, 1]]).double().repeat(len(positions), 1),
        "offset": torch.stack([x, y], 1)[..., None, None] + 0.5,
        "output_size": (1, 1),
        "spatial_scale": 1.0,
        "output_dim": 1,
        "group_size": 1,
        "part_size": 1,
        "sample_per_part": 1,
        "trans_std": 0.5,
    }
    return place(arguments, TYPES[types], device)


@pytest.mark.parametrize(
    ("geometry", "forward", "backward"),
    [
        ({}, 8 * 864 + 216, 16 * 864 + 216),
        ({"classes": None}, 8 * 864 + 216, 8 * 864 + 216),
        ({"sample_per_part": 3}, 8 * 1944 + 216, 16 * 1944 + 216),
    ],
    ids=str,
)
def test_flops_equal_the_hand_count(geometry: dict, forward: int, backward: int) -> None:
    """6 RoIs x 6 channels x 3 x 2 bins = 216 values of 2 x 2 samples each."""
    arguments = TestContract().place(make(**geometry))
    with FlopCounterMode(display=False) as counter:
        output = deform_ps_roi_pool(**arguments)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == backward

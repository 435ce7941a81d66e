"""Deformable convolution v1 and v2; semantics and contracts of mmdeform.ops.deform_conv2d."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmdeform.ops import deform_conv2d, deform_conv2d_reference

from .contracts import OperatorContract
from .contracts.operator import TYPES, Arguments, Case, off_integer_lines


def make(
    batch: int = 2,
    channels: int = 6,
    size: tuple[int, int] = (7, 6),
    out_channels: int = 10,
    kernel_size: tuple[int, int] = (3, 2),
    stride: tuple[int, int] = (2, 1),
    padding: tuple[int, int] = (1, 0),
    dilation: tuple[int, int] = (2, 1),
    groups: int = 2,
    deform_groups: int = 3,
    mask: bool = True,
    bias: bool = True,
) -> Arguments:
    """Random arguments; offsets of up to three pixels, so some samples lie outside."""
    taps = kernel_size[0] * kernel_size[1]
    out = tuple(
        (s + 2 * p - d * (k - 1) - 1) // st + 1
        for s, p, d, k, st in zip(size, padding, dilation, kernel_size, stride, strict=True)
    )
    double = {"dtype": torch.float64}
    return {
        "input": torch.randn(batch, channels, *size, **double),
        "offset": off_integer_lines(batch, deform_groups * taps * 2, *out),
        "weight": torch.randn(out_channels, channels // groups, *kernel_size, **double),
        "bias": torch.randn(out_channels, **double) if bias else None,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "mask": torch.rand(batch, deform_groups * taps, *out, **double) + 0.2 if mask else None,
    }


def case(emulated: bool = True, **geometry: Any) -> Case:
    return Case(lambda: make(**geometry), emulated)


PLAIN = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), kernel_size=(3, 3))

CASES = {
    # Swapped axes would show; odd numbers of channels per group.
    "asymmetric": case(),
    "tiny": case(size=(5, 3), out_channels=6),
    "v1": case(mask=False),
    "no-bias": case(bias=False),
    "v1-no-bias": case(mask=False, bias=False),
    "wide-image": case(size=(3, 11), padding=(2, 1), dilation=(1, 3)),
    "one-pixel": case(size=(1, 1), padding=(2, 1), dilation=(1, 1), stride=(1, 1)),
    "1x1-kernel": case(kernel_size=(1, 1), padding=(0, 0), dilation=(1, 1)),
    "5x5-kernel": case(
        kernel_size=(5, 5), padding=(2, 2), dilation=(1, 1), channels=2, groups=1,
        deform_groups=1, out_channels=3,
    ),
    "7x1-kernel": case(kernel_size=(7, 1), padding=(3, 0), dilation=(1, 1)),
    "plain-3x3": case(**PLAIN, channels=8, out_channels=8, groups=1, deform_groups=1),
    "one-channel": case(channels=1, out_channels=1, groups=1, deform_groups=1),
    "resnext": case(**PLAIN, channels=16, out_channels=16, groups=8, deform_groups=1),
    "depthwise": case(**PLAIN, channels=6, out_channels=6, groups=6, deform_groups=1),
    "depthwise-all-offsets": case(channels=6, out_channels=12, groups=6, deform_groups=6),
    "more-groups-than-deform-groups": case(channels=12, out_channels=4, groups=4, deform_groups=2),
    "33-channels": case(channels=33, out_channels=17, groups=1, deform_groups=1, size=(5, 4)),
    "1-image": case(batch=1),
    "33-images": case(batch=33, size=(3, 3), stride=(1, 1), dilation=(1, 1), out_channels=2),
    "no-image": case(batch=0),
    "c3": case(False, **PLAIN, channels=64, size=(25, 21), out_channels=64, groups=1,
               deform_groups=1),
    "many-channels": case(False, **PLAIN, channels=260, size=(9, 8), out_channels=70, groups=2,
                          deform_groups=4, batch=3),
    "long-rows": case(False, **PLAIN, channels=4, size=(3, 120), out_channels=6, groups=1,
                      deform_groups=2),
}  # fmt: skip


class TestContract(OperatorContract):
    name = "deform_conv2d"
    data = ("input", "weight", "bias")
    coordinates = ("offset", "mask")
    backward_returns = ("input", "offset", "mask", "weight")
    cases = CASES

    @staticmethod
    def schema_arguments(arguments: Arguments) -> tuple:
        input, offset, weight = (arguments[key] for key in ("input", "offset", "weight"))
        geometry = [list(arguments[key]) for key in ("stride", "padding", "dilation")]
        groups = input.shape[1] // weight.shape[1]
        deform_groups = offset.shape[1] // (2 * weight.shape[2] * weight.shape[3])
        mask, bias = arguments["mask"], arguments["bias"]
        return (input, offset, mask, weight, bias, *geometry, groups, deform_groups)

    def backward_arguments(
        self, grad_output: Tensor, arguments: Arguments, deterministic: bool = False
    ) -> tuple:
        input, offset, mask, weight, _, *geometry = self.schema_arguments(arguments)
        return (grad_output, input, offset, mask, weight, *geometry, deterministic)

    def sized(self, size: int) -> Arguments:
        # No two sizes are equal that differ in general: torch.compile would tie them together.
        return make(batch=3 + size, size=(15 + 4 * size, 25 + 3 * size), channels=12)

    def contended(self) -> Arguments:
        arguments = make(
            **PLAIN, size=(33, 30), channels=64, out_channels=48, groups=1, deform_groups=2
        )
        arguments["offset"][:, :, ::2] = 1e-2  # plain convolution: nine samples at each pixel
        return arguments


def brute_force(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    mask: Tensor | None,
) -> Tensor:
    """Every pixel of the image, weighted by the tents over its rows and columns."""
    batch, channels, height, width = input.shape
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    taps = kernel_h * kernel_w
    groups, deform_groups = channels // group_channels, offset.shape[1] // (2 * taps)
    output = torch.zeros(batch, out_channels, *offset.shape[2:], dtype=torch.float64)
    for n, ho, wo in torch.cartesian_prod(*map(torch.arange, (batch, *offset.shape[2:]))).tolist():
        for c in range(channels):
            deform_group = c // (channels // deform_groups)
            group = c // group_channels
            outputs = slice(*(x * (out_channels // groups) for x in (group, group + 1)))
            for i in range(kernel_h):
                for j in range(kernel_w):
                    tap = deform_group * taps + i * kernel_w + j
                    dy, dx = (
                        offset[n, 2 * tap, ho, wo].item(),
                        offset[n, 2 * tap + 1, ho, wo].item(),
                    )
                    row = ho * stride[0] - padding[0] + i * dilation[0] + dy
                    column = wo * stride[1] - padding[1] + j * dilation[1] + dx
                    sample = 0.0
                    for r in range(height):
                        for s in range(width):
                            tent = max(0, 1 - abs(row - r)) * max(0, 1 - abs(column - s))
                            sample += tent * input[n, c, r, s].item() if tent else 0
                    if mask is not None:
                        sample *= mask[n, tap, ho, wo].item()
                    output[n, outputs, ho, wo] += sample * weight[outputs, c % group_channels, i, j]
    return output if bias is None else output + bias[:, None, None]


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize(
    "geometry",
    [
        dict(batch=2, size=(4, 3)),
        dict(batch=1, size=(2, 5), padding=(2, 1), groups=1, deform_groups=6, out_channels=3),
        dict(batch=1, size=(3, 3), padding=(2, 0), dilation=(1, 2), groups=6, out_channels=6),
    ],
    ids=["asymmetric", "six-deform-groups", "depthwise"],
)
def test_reference_equals_brute_force(geometry: dict, mask: bool) -> None:
    arguments = make(**geometry, mask=mask)
    expected = brute_force(**arguments)
    assert expected.std() > 0.5
    actual = deform_conv2d_reference(*TestContract.schema_arguments(arguments))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def run(arguments: Arguments) -> dict[str, Tensor]:
    """Output and gradients of its sum."""
    leaves = {
        key: value.detach().requires_grad_()
        for key, value in arguments.items()
        if isinstance(value, Tensor)
    }
    output = deform_conv2d(**{**arguments, **leaves})
    grads = torch.autograd.grad(output.sum(), list(leaves.values()))
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def place(arguments: Arguments, types: tuple, device: str) -> Arguments:
    return TestContract().place(arguments, types, device, requires_grad=False)


def sampled(
    height: int, width: int, device: str, positions: list[tuple[float, float]], mask: bool = False
) -> Arguments:
    """An image whose pixel (r, c) is 10 + 3 r + c, sampled at (row, column) ``positions``.

    A 1x1 kernel of weight one over the first row: output pixel i is the sample at position i.
    """
    count = len(positions)
    assert count <= width
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    offset = torch.zeros(1, 2, height, width, dtype=torch.float64)
    offset[0, 0] = -100  # everywhere else: outside
    offset[0, 0, 0, :count] = torch.tensor([p[0] for p in positions])
    offset[0, 1, 0, :count] = torch.tensor([p[1] for p in positions]) - torch.arange(count)
    arguments = {
        "input": (10 + 3 * rows + columns).double()[None, None],
        "offset": offset,
        "weight": torch.ones(1, 1, 1, 1, dtype=torch.float64),
        "mask": torch.ones(1, 1, height, width, dtype=torch.float64) if mask else None,
    }
    return place(arguments, TYPES["fp64"], device)


@pytest.mark.emulated
class TestEdges:
    @pytest.mark.parametrize("mask", [False, True], ids=["v1", "v2"])
    @pytest.mark.parametrize("dtypes", TYPES)
    def test_zero_offset_is_a_convolution(self, dtypes: str, mask: bool, device: str) -> None:
        types = TYPES[dtypes]
        arguments = place(make(mask=False), types, device)
        arguments["offset"].zero_()
        if mask:
            arguments["mask"] = arguments["offset"][:, ::2] + 1
        expected = F.conv2d(
            arguments["input"].double(), arguments["weight"].double(), arguments["bias"].double(),
            (2, 1), (1, 0), (2, 1), groups=2,
        )  # fmt: skip
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(types[0], 5e-2)
        torch.testing.assert_close(
            deform_conv2d(**arguments).double(), expected, rtol=tolerance, atol=tolerance
        )

    def test_mask_of_one_half_halves(self, device: str) -> None:
        """The mask is used as it is: no sigmoid, no normalisation."""
        v1 = place(make(mask=False, bias=False), TYPES["fp32"], device)
        v2 = {**v1, "mask": torch.full_like(v1["offset"][:, ::2], 0.5)}
        torch.testing.assert_close(deform_conv2d(**v2), deform_conv2d(**v1) / 2)
        torch.testing.assert_close(deform_conv2d(**{**v2, "mask": v2["mask"] * -4}),
                                   deform_conv2d(**v1) * -2)  # fmt: skip

    @pytest.mark.parametrize("mask", [False, True], ids=["v1", "v2"])
    def test_border(self, mask: bool, device: str) -> None:
        """Zero padding, for v1 too: samples within one pixel outside fade, -1 and H are zero.

        The MXNet operator of 2017 clamps at the far edge and drops everything before the first
        pixel: it would give 0 at -0.75 and the whole border pixel at H - 0.75.
        """
        height, width = 4, 9
        positions = [(-1, 2), (height, 2), (1, -1), (1, width), (-0.75, 2), (height - 0.75, 2),
                     (1, -0.75), (1, width - 0.75)]  # fmt: skip
        result = run(sampled(height, width, device, positions, mask))
        expected = [0, 0, 0, 0, 0.25 * 12, 0.75 * 21, 0.25 * 13, 0.75 * 21]
        torch.testing.assert_close(
            result["output"][0, 0, 0, :8].cpu(), torch.tensor(expected).double()
        )
        grads = result["offset"][0, :, 0, :8].cpu()
        assert not grads[:, :4].any()
        assert grads[0, 4:6].tolist() == [12, -21]
        assert grads[1, 6:8].tolist() == [13, -21]

    def test_integer_positions_have_the_right_sided_gradient(self, device: str) -> None:
        arguments = sampled(3, 5, device, [(1, 2), (0, 0), (2, 4)])
        arguments["input"].square_()
        pixels = arguments["input"][0, 0].cpu()
        result = run(arguments)
        assert result["output"][0, 0, 0, :3].tolist() == [
            pixels[1, 2], pixels[0, 0], pixels[2, 4]
        ]  # fmt: skip
        right = torch.tensor([
            [pixels[2, 2] - pixels[1, 2], pixels[1, 0] - pixels[0, 0], -pixels[2, 4]],
            [pixels[1, 3] - pixels[1, 2], pixels[0, 1] - pixels[0, 0], -pixels[2, 4]],
        ])  # fmt: skip
        torch.testing.assert_close(result["offset"][0, :, 0, :3].cpu(), right.double())

    @pytest.mark.parametrize("mask", [False, True], ids=["v1", "v2"])
    @pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
    @pytest.mark.parametrize("position", [1e9, -1e9, math.nan, math.inf, -math.inf], ids=str)
    @pytest.mark.parametrize("axis", [0, 1])
    def test_positions_far_outside(
        self, position: float, axis: int, types: tuple, mask: bool, device: str
    ) -> None:
        """One such tap contributes nothing, gets no gradient and leaves the others alone."""
        outside = place(make(), types, device)
        tap, pixel = 7, (2, 3)  # the second deform group: channels 2 and 3
        if not mask:
            outside["mask"] = None
        far_away = dict(outside, offset=outside["offset"].clone())
        far_away["offset"][(1, slice(2 * tap, 2 * tap + 2), *pixel)] = -50
        outside["offset"][(1, 2 * tap + axis, *pixel)] = position
        actual, expected = run(outside), run(far_away)
        assert not actual["offset"][(1, slice(2 * tap, 2 * tap + 2), *pixel)].any()
        for key, tensor in expected.items():
            assert tensor.isfinite().all()
            torch.testing.assert_close(actual[key], tensor, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("position", [50, math.nan], ids=str)
    def test_all_samples_outside(self, position: float, device: str) -> None:
        arguments = place(make(), TYPES["fp32"], device)
        arguments["offset"].fill_(position)
        result = run(arguments)
        expected = arguments["bias"][:, None, None].expand_as(result["output"])
        assert torch.equal(result["output"], expected)
        for key in ("input", "offset", "mask", "weight"):
            assert not result[key].any(), key

    def test_identical_points(self, device: str) -> None:
        """Every sample at the same place: all gradients of the image meet in four pixels."""
        arguments = sampled(9, 9, device, [])
        rows = torch.arange(9, device=device).double()
        arguments["offset"][0, 0] = 2.5 - rows[:, None]
        arguments["offset"][0, 1] = 3.25 - rows
        result = run(arguments)
        expected = torch.zeros(9, 9, dtype=torch.float64)
        expected[2:4, 3] = 81 * 0.5 * 0.75
        expected[2:4, 4] = 81 * 0.5 * 0.25
        torch.testing.assert_close(result["input"][0, 0].cpu(), expected)
        assert torch.equal(result["output"], torch.full_like(result["output"], 10 + 7.5 + 3.25))

    @pytest.mark.parametrize("mask", [False, True], ids=["v1", "v2"])
    @pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
    @pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
    def test_bad_pixels_stay_where_they_are(
        self, bad: float, types: tuple, mask: bool, device: str
    ) -> None:
        """A pixel that is not finite reaches exactly the samples that touch it."""
        positions = [(1.5, 1.5), (2.5, 2.5), (2.25, 3.75), (0.5, 3.5), (9, 9)]
        arguments = place(sampled(4, 6, device, positions, mask), types, device)
        arguments["input"][0, 0, 1, 1] = bad
        result = run(arguments)
        touched = torch.zeros(4, 6, dtype=torch.bool)
        touched[0, 0] = True
        assert torch.equal(~result["output"][0, 0].isfinite().cpu(), touched)
        assert torch.equal(~result["offset"][0].isfinite().all(0).cpu(), touched)
        assert result["input"].isfinite().all()
        assert not mask or torch.equal(~result["mask"][0, 0].isfinite().cpu(), touched)

    @pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
    def test_bad_pixels_beside_the_border(self, types: tuple, device: str) -> None:
        """Corners outside the image do not pull in pixels through clamped addresses."""
        positions = [(-0.5, 2.5), (3.5, 2.5), (1.5, -0.5), (1.5, 5.5), (-0.5, -0.5)]
        arguments = place(sampled(4, 6, device, positions), types, device)
        arguments["input"][0, 0, 1:3, 1:5] = math.nan
        result = run(arguments)
        assert result["output"].isfinite().all()
        assert result["offset"].isfinite().all()

    def test_bad_channels_stay_in_their_group(self, device: str) -> None:
        arguments = place(make(), TYPES["fp32"], device)
        arguments["input"][:, :3] = math.nan  # the first of two groups
        result = run(arguments)
        assert result["output"][:, 5:].isfinite().all()
        assert result["weight"][5:].isfinite().all()
        assert result["input"].isfinite().all()

    def test_coordinates_stay_fp32_beside_half_data(self, device: str) -> None:
        """At column 254 a bf16 position would be a whole pixel off."""
        arguments = sampled(1, 300, device, [])
        arguments["offset"].zero_()
        arguments["input"][:] = torch.arange(300, device=device) % 2
        arguments["offset"][0, 1, 0, 250:260] = 0.375
        expected = deform_conv2d(**arguments)
        assert expected[0, 0, 0, 250:260].tolist() == [0.375, 0.625] * 5
        for types in TYPES.values():
            actual = deform_conv2d(**place(arguments, types, device))
            assert torch.equal(actual.double(), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_autocast_keeps_fp32_offsets(self, dtype: torch.dtype, device: str) -> None:
        """An offset of 201.375 pixels would be 201 or 202 in bf16."""
        arguments = place(sampled(1, 300, device, []), TYPES["fp32"], device)
        arguments["offset"].zero_()
        arguments["input"][:] = torch.arange(300, device=device) % 2
        arguments["offset"][0, 1, 0, :2] = 201.375
        with torch.autocast(device, dtype):
            output = deform_conv2d(**arguments)
        assert output.dtype == dtype
        assert output[0, 0, 0, :2].tolist() == [0.625, 0.375]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_sums_are_wider_than_16_bits(self, dtype: torch.dtype, device: str) -> None:
        """4096 equal products: a sum in bf16 would stop at 256, one in fp16 at 2048."""
        arguments = place(sampled(1, 1, device, []), (dtype, dtype), device)
        arguments["offset"].zero_()
        arguments["input"] = torch.ones(1, 4096, 1, 1, dtype=dtype, device=device)
        arguments["weight"] = torch.ones(1, 4096, 1, 1, dtype=dtype, device=device)
        result = run(arguments)
        assert result["output"].item() == 4096
        arguments = place(sampled(64, 64, device, []), (dtype, torch.float32), device)
        arguments["input"].fill_(1)
        grid = torch.arange(64, device=device)
        arguments["offset"][0, 0] = -grid[:, None]  # every output pixel samples pixel (0, 0)
        arguments["offset"][0, 1] = -grid
        result = run(arguments)
        assert result["input"][0, 0, 0, 0].item() == 4096
        assert result["weight"].item() == 4096

    @pytest.mark.parametrize(
        ("scalar", "pair"), [(1, (1, 1)), (2, (2, 2)), (3, [3, 3])], ids=["1", "2", "3"]
    )
    def test_integers_stand_for_pairs(self, scalar: int, pair: Any, device: str) -> None:
        geometry = dict(stride=(scalar,) * 2, padding=(scalar,) * 2, dilation=(scalar,) * 2)
        arguments = place(make(size=(9, 8), **geometry), TYPES["fp32"], device)
        expected = deform_conv2d(**arguments)
        arguments.update(stride=scalar, padding=scalar, dilation=scalar)
        assert torch.equal(deform_conv2d(**arguments), expected)
        arguments.update(stride=pair, padding=pair, dilation=pair)
        assert torch.equal(deform_conv2d(**arguments), expected)

    def test_defaults(self, device: str) -> None:
        arguments = place(
            make(stride=(1, 1), padding=(0, 0), dilation=(1, 1), mask=False, bias=False),
            TYPES["fp32"],
            device,
        )
        expected = deform_conv2d(**arguments)
        short = (arguments[key] for key in ("input", "offset", "weight"))
        assert torch.equal(deform_conv2d(*short), expected)


def test_flops_equal_the_hand_count() -> None:
    """2 images of 3 x 5 outputs: 30 pixels x 6 taps x 6 channels = 1080 sampled values.

    The product has 30 pixels x 10 outputs x 3 channels of a group x 6 taps = 5400 multiply-adds.
    """
    for mask, forward, backward in ((True, 10, 26), (False, 8, 24)):
        arguments = TestContract().place(make(mask=mask))
        with FlopCounterMode(display=False) as counter:
            output = deform_conv2d(**arguments)
        assert output.shape == (2, 10, 3, 5)
        assert counter.get_total_flops() == 2 * 5400 + forward * 1080
        with FlopCounterMode(display=False) as counter:
            output.sum().backward()
        assert counter.get_total_flops() == 4 * 5400 + backward * 1080

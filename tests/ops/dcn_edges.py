"""Borders, strange positions and values, narrow dtypes: tests that dcnv3 and dcnv4 inherit."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .contracts.operator import TYPES, Arguments
from .dcn import PLAIN, TENSORS, make


def place(arguments: Arguments, types: tuple, device: str) -> Arguments:
    """Copies of the tensors on a device, in the data and coordinate dtypes ``types``."""
    dtypes = dict(zip(TENSORS, (types[0], types[1], types[1]), strict=True))
    return {
        key: value.to(device, dtypes[key], copy=True) if key in dtypes else value
        for key, value in arguments.items()
    }


def sampled(height: int, width: int, device: str, positions: list[tuple]) -> Arguments:
    """An image whose pixel (r, c) is 10 + 3 r + c, sampled at (row, column) ``positions``.

    A 1x1 kernel of weight one over the first row: output pixel i is the sample at position i.
    """
    count = len(positions)
    assert count <= width
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    offset = torch.full((1, height, width, 2), -100.0, dtype=torch.float64)  # outside
    for i, (row, column) in enumerate(positions):
        offset[0, 0, i] = torch.tensor([column - i, row])
    arguments = {
        "input": (10 + 3 * rows + columns).double()[None, :, :, None],
        "offset": offset,
        "mask": torch.ones(1, height, width, 1, dtype=torch.float64),
        "kernel_size": 1,
        "padding": 0,
    }
    return place(arguments, TYPES["fp64"], device)


@pytest.mark.emulated
class Edges:
    """Tests of either operator; arguments and gradients are those of dcnv3."""

    @staticmethod
    def call(arguments: Arguments) -> Tensor:
        """The operator on the arguments of dcnv3."""
        raise NotImplementedError

    def run(self, arguments: Arguments) -> dict[str, Tensor]:
        """Output and gradients of its sum."""
        leaves = {key: arguments[key].detach().requires_grad_() for key in TENSORS}
        output = self.call({**arguments, **leaves})
        grads = torch.autograd.grad(output.sum(), list(leaves.values()))
        return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}

    @pytest.mark.parametrize("dtypes", TYPES)
    def test_zero_offset_is_a_depthwise_convolution(self, dtypes: str, device: str) -> None:
        """Taps are column-major; the mask is used as it is, without softmax."""
        types = TYPES[dtypes]
        arguments = place(make(offset_scale=1.0), types, device)
        arguments["offset"].zero_()
        filters = torch.randn(3, 2, 3, device=device).to(types[1])  # (G, Kw, Kh)
        arguments["mask"] = filters.flatten().expand_as(arguments["mask"]).contiguous()
        weight = filters.transpose(1, 2).repeat_interleave(5, 0)[:, None].double()
        expected = F.conv2d(
            arguments["input"].permute(0, 3, 1, 2).double(), weight, None, (2, 1), (1, 0), (2, 1),
            groups=15,
        )  # fmt: skip
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(types[0], 5e-2)
        torch.testing.assert_close(
            self.call(arguments).double(),
            expected.permute(0, 2, 3, 1),
            rtol=tolerance,
            atol=tolerance,
        )

    def test_offset_scale_stretches_about_the_center(self, device: str) -> None:
        """Without offsets a scale of two is a dilation of two; the padding keeps the centre."""
        narrow = place(make(**PLAIN), TYPES["fp64"], device)
        narrow["offset"].zero_()
        wide = {**narrow, "dilation": (2, 2), "padding": (2, 2)}
        stretched = self.call({**narrow, "offset_scale": 2})
        torch.testing.assert_close(stretched, self.call(wide))
        assert not torch.allclose(stretched, self.call(narrow))

    def test_remove_center_leaves_out_the_middle_tap(self, device: str) -> None:
        full = place(make(**PLAIN, groups=2), TYPES["fp64"], device)
        kept = torch.arange(9, device=device) != 4
        size = full["mask"].shape[:3]
        offset = full["offset"].view(*size, 2, 9, 2)[..., kept, :].flatten(3)
        mask = full["mask"].view(*size, 2, 9)[..., kept].flatten(3)
        full["mask"].view(*size, 2, 9)[..., 4] = 0
        without = {**full, "offset": offset, "mask": mask, "remove_center": True}
        torch.testing.assert_close(self.call(without), self.call(full))

    def test_border(self, device: str) -> None:
        """Samples within one pixel outside fade; those at exactly -1 and H are zero."""
        height, width = 4, 9
        positions = [(-1, 2), (height, 2), (1, -1), (1, width), (-0.75, 2), (height - 0.75, 2),
                     (1, -0.75), (1, width - 0.75)]  # fmt: skip
        result = self.run(sampled(height, width, device, positions))
        expected = [0, 0, 0, 0, 0.25 * 12, 0.75 * 21, 0.25 * 13, 0.75 * 21]
        torch.testing.assert_close(
            result["output"][0, 0, :8, 0].cpu(), torch.tensor(expected).double()
        )
        grads = result["offset"][0, 0, :8].cpu()  # (x, y)
        assert not grads[:4].any()
        assert grads[4:6, 1].tolist() == [12, -21]
        assert grads[6:8, 0].tolist() == [13, -21]

    def test_integer_positions_have_the_right_sided_gradient(self, device: str) -> None:
        arguments = sampled(3, 5, device, [(1, 2), (0, 0), (2, 4)])
        arguments["input"].square_()
        pixels = arguments["input"][0, :, :, 0].cpu()
        result = self.run(arguments)
        assert result["output"][0, 0, :3, 0].tolist() == [pixels[1, 2], pixels[0, 0], pixels[2, 4]]
        right = torch.tensor([
            [pixels[1, 3] - pixels[1, 2], pixels[2, 2] - pixels[1, 2]],
            [pixels[0, 1] - pixels[0, 0], pixels[1, 0] - pixels[0, 0]],
            [-pixels[2, 4], -pixels[2, 4]],
        ])  # fmt: skip
        torch.testing.assert_close(result["offset"][0, 0, :3].cpu(), right.double())

    @pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
    @pytest.mark.parametrize("position", [1e9, -1e9, math.nan, math.inf, -math.inf], ids=str)
    @pytest.mark.parametrize("axis", [0, 1])
    def test_positions_far_outside(
        self, position: float, axis: int, types: tuple, device: str
    ) -> None:
        """One such tap contributes nothing, gets no gradient and leaves the others alone."""
        outside = place(make(), types, device)
        tap, pixel = 7, (1, 2, 3)  # of the second group
        far_away = {**outside, "offset": outside["offset"].clone()}
        far_away["offset"][(*pixel, slice(2 * tap, 2 * tap + 2))] = -50
        outside["offset"][(*pixel, 2 * tap + axis)] = position
        actual, expected = self.run(outside), self.run(far_away)
        assert not actual["offset"][(*pixel, slice(2 * tap, 2 * tap + 2))].any()
        assert not actual["mask"][(*pixel, tap)].any()
        for key, tensor in expected.items():
            assert tensor.isfinite().all()
            torch.testing.assert_close(actual[key], tensor, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("position", [50, math.nan], ids=str)
    def test_all_samples_outside(self, position: float, device: str) -> None:
        arguments = place(make(), TYPES["fp32"], device)
        arguments["offset"].fill_(position)
        for key, tensor in self.run(arguments).items():
            assert not tensor.any(), key

    def test_identical_points(self, device: str) -> None:
        """Every sample at the same place: all gradients of the image meet in four pixels."""
        arguments = sampled(9, 9, device, [])
        steps = torch.arange(9, device=device).double()
        arguments["offset"][0, :, :, 0] = 3.25 - steps
        arguments["offset"][0, :, :, 1] = 2.5 - steps[:, None]
        result = self.run(arguments)
        expected = torch.zeros(9, 9, dtype=torch.float64)
        expected[2:4, 3] = 81 * 0.5 * 0.75
        expected[2:4, 4] = 81 * 0.5 * 0.25
        torch.testing.assert_close(result["input"][0, :, :, 0].cpu(), expected)
        assert torch.equal(result["output"], torch.full_like(result["output"], 10 + 7.5 + 3.25))

    @pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
    @pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
    def test_bad_pixels_stay_where_they_are(self, bad: float, types: tuple, device: str) -> None:
        """A pixel that is not finite reaches exactly the samples that touch it."""
        positions = [(1.5, 1.5), (2.5, 2.5), (2.25, 3.75), (0.5, 3.5), (9, 9)]
        arguments = place(sampled(4, 6, device, positions), types, device)
        arguments["input"][0, 1, 1] = bad
        result = self.run(arguments)
        touched = torch.zeros(4, 6, dtype=torch.bool)
        touched[0, 0] = True
        assert torch.equal(~result["output"][0, :, :, 0].isfinite().cpu(), touched)
        assert torch.equal(~result["offset"][0].isfinite().all(2).cpu(), touched)
        assert torch.equal(~result["mask"][0, :, :, 0].isfinite().cpu(), touched)
        assert result["input"].isfinite().all()

    @pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
    def test_bad_pixels_beside_the_border(self, types: tuple, device: str) -> None:
        """Corners outside the image do not pull in pixels through clamped addresses."""
        positions = [(-0.5, 2.5), (3.5, 2.5), (1.5, -0.5), (1.5, 5.5), (-0.5, -0.5)]
        arguments = place(sampled(4, 6, device, positions), types, device)
        arguments["input"][0, 1:3, 1:5] = math.nan
        result = self.run(arguments)
        assert result["output"].isfinite().all()
        assert result["offset"].isfinite().all()

    @pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
    def test_bad_weights_outside_have_no_gradient(self, bad: float, device: str) -> None:
        """Where a position does not contribute its gradient is zero, whatever the weight."""
        arguments = sampled(3, 4, device, [(1.5, 1.5)])
        arguments["mask"][0, 2, 3] = bad
        result = self.run(arguments)
        assert not result["offset"][0, 2, 3].any() and not result["mask"][0, 2, 3].any()
        assert result["offset"][0, 0, 0].tolist() == [1, 3]

    def test_bad_channels_stay_in_their_group(self, device: str) -> None:
        arguments = place(make(), TYPES["fp32"], device)
        arguments["input"][..., 5:10] = math.nan  # the second of three groups
        result = self.run(arguments)
        good = torch.tensor([True] * 5 + [False] * 5 + [True] * 5)
        assert result["output"][..., good].isfinite().all()
        assert result["input"].isfinite().all()
        for key, per_group in (("offset", 12), ("mask", 6)):
            groups = result[key].isfinite().unflatten(3, (3, per_group)).all(4)
            assert groups[..., ::2].all()
            assert not groups[..., 1].all()

    def test_coordinates_stay_fp32_beside_half_data(self, device: str) -> None:
        """At column 254 a bf16 position would be a whole pixel off."""
        arguments = sampled(1, 300, device, [])
        arguments["offset"].zero_()
        arguments["input"][0, 0, :, 0] = torch.arange(300, device=device) % 2
        arguments["offset"][0, 0, 250:260, 0] = 0.375
        expected = self.call(arguments)
        assert expected[0, 0, 250:260, 0].tolist() == [0.375, 0.625] * 5
        for types in TYPES.values():
            actual = self.call(place(arguments, types, device))
            assert torch.equal(actual.double(), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_autocast_keeps_fp32_offsets(self, dtype: torch.dtype, device: str) -> None:
        """An offset of 201.375 pixels would be 201 or 202 in bf16."""
        arguments = place(sampled(1, 300, device, []), TYPES["fp32"], device)
        arguments["offset"].zero_()
        arguments["input"][0, 0, :, 0] = torch.arange(300, device=device) % 2
        arguments["offset"][0, 0, :2, 0] = 201.375
        with torch.autocast(device, dtype):
            output = self.call(arguments)
        assert output.dtype == dtype
        assert output[0, 0, :2, 0].tolist() == [0.625, 0.375]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_sums_are_wider_than_16_bits(self, dtype: torch.dtype, device: str) -> None:
        """4096 equal products: a sum in bf16 would stop at 256, one in fp16 at 2048."""
        arguments = place(sampled(64, 64, device, []), (dtype, torch.float32), device)
        arguments["input"].fill_(1)
        steps = torch.arange(64, device=device)
        arguments["offset"][0, :, :, 0] = -steps  # every output pixel samples pixel (0, 0)
        arguments["offset"][0, :, :, 1] = -steps[:, None]
        assert self.run(arguments)["input"][0, 0, 0, 0].item() == 4096
        arguments.update(
            kernel_size=64,
            offset=arguments["offset"].new_zeros(1, 1, 1, 2 * 4096),
            mask=arguments["mask"].view(1, 1, 1, 4096),
        )
        assert self.run(arguments)["output"].item() == 4096

    @pytest.mark.parametrize("scalar", [1, 2, 3])
    def test_integers_stand_for_pairs(self, scalar: int, device: str) -> None:
        keys = ("kernel_size", "stride", "padding", "dilation")
        arguments = place(make(size=(9, 8), **{key: (scalar,) * 2 for key in keys}),
                          TYPES["fp32"], device)  # fmt: skip
        expected = self.call(arguments)
        for value in (scalar, [scalar, scalar]):
            assert torch.equal(self.call({**arguments, **dict.fromkeys(keys, value)}), expected)

    def test_defaults(self, device: str) -> None:
        arguments = place(make(**PLAIN, groups=1), TYPES["fp32"], device)
        expected = self.call(arguments)
        assert torch.equal(self.call({key: arguments[key] for key in TENSORS}), expected)

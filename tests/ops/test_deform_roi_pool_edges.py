"""Deformable RoI pooling where samples, offsets or RoIs lie at or beyond the border."""

import math

import pytest
import torch

from mmdeform.ops import deform_roi_pool

from .contracts.operator import TYPES
from .test_deform_roi_pool import make, place, run, sampled


@pytest.mark.emulated
class TestBorder:
    def test_samples_up_to_one_pixel_outside_are_clamped(self, device: str) -> None:
        """RoIAlign's rule: -1 and H still count, what is beyond does not."""
        height, width, little = 4, 6, 2.0**-12
        inside = [(-1, 2), (height, 2), (1, -1), (1, width), (-1, -1), (-0.25, 2), (3.5, 2.5)]
        outside = [(-1 - little, 2), (height + little, 2), (1, -1 - little), (1, width + little)]
        result = run(sampled(height, width, inside + outside, device))
        values = [12, 21, 13, 18, 10, 12, 21.5] + [0] * 4
        assert result["output"].flatten().tolist() == values
        # (x, y): only where a coordinate is not clamped does it change the value.
        slopes = [(1, 0), (1, 0), (0, 3), (0, 3), (0, 0), (1, 0), (1, 0)] + [(0, 0)] * 4
        assert result["offset"].flatten(1).tolist() == [list(slope) for slope in slopes]
        assert result["mask"].flatten().tolist() == values

    def test_integer_positions_have_the_right_sided_gradient(self, device: str) -> None:
        arguments = sampled(3, 5, [(1, 2), (0, 0), (2, 4), (2, 1), (0, 4)], device)
        arguments["input"].square_()
        pixels = arguments["input"][0, 0].cpu()
        result = run(arguments)
        expected = [pixels[1, 2], pixels[0, 0], pixels[2, 4], pixels[2, 1], pixels[0, 4]]
        assert result["output"].flatten().tolist() == expected
        slopes = [
            [pixels[1, 3] - pixels[1, 2], pixels[2, 2] - pixels[1, 2]],
            [pixels[0, 1] - pixels[0, 0], pixels[1, 0] - pixels[0, 0]],
            [0, 0],
            [pixels[2, 2] - pixels[2, 1], 0],
            [0, pixels[1, 4] - pixels[0, 4]],
        ]
        assert result["offset"].flatten(1).tolist() == slopes

    @pytest.mark.parametrize(
        "position", [(-0.5, 2.3), (3.6, 2.3), (1.3, -0.5), (1.3, 5.6), (3.4, 5.4)], ids=str
    )
    @pytest.mark.parametrize("sampling_ratio", [0, 1, 2])
    def test_gradcheck_where_samples_are_clamped(
        self, position: tuple, sampling_ratio: int, device: str
    ) -> None:
        arguments = sampled(4, 6, [position], device)
        arguments["input"] = torch.randn_like(arguments["input"])
        arguments["sampling_ratio"] = sampling_ratio
        # Away from the whole pixels at which the slope changes.
        offset = torch.full_like(arguments.pop("offset"), 0.17).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda offset: deform_roi_pool(offset=offset, **arguments), offset, nondet_tol=1e-12
        )

    @pytest.mark.parametrize("types", TYPES)
    @pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
    def test_bad_pixels_stay_where_they_are(self, bad: float, types: str, device: str) -> None:
        """A pixel that is not finite reaches exactly the samples that touch it."""
        positions = [(1.5, 1.5), (2.5, 2.5), (2.25, 3.75), (0.5, 3.5), (9, 9), (-9, 1), (2.5, -0.5)]
        arguments = sampled(4, 6, positions, device, types)
        arguments["input"][0, 0, 1, 1] = bad
        arguments["input"][0, 0, 0, 0] = bad  # clamped addresses would come here
        result = run(arguments)
        touched = torch.tensor([True] + [False] * 6)
        for key in ("output", "offset", "mask"):
            assert torch.equal(~result[key].flatten(1).isfinite().all(1).cpu(), touched), key
        assert result["input"].isfinite().all()


@pytest.mark.emulated
class TestNotFinite:
    @pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
    @pytest.mark.parametrize("value", [1e9, -1e9, math.nan, math.inf, -math.inf], ids=str)
    @pytest.mark.parametrize("axis", [0, 1])
    def test_offsets(self, value: float, axis: int, types: tuple, device: str) -> None:
        """Such a bin is zero, gets no gradient and leaves the others alone."""
        bad = place(make(), types, device)
        good = dict(bad, mask=bad["mask"].clone())
        bad["offset"] = bad["offset"].clone()
        bad["offset"][1, axis, 2, 1] = value
        good["mask"][1, 2, 1] = 0
        actual, expected = run(bad), run(good)
        for key in ("output", "offset", "mask"):
            bins = actual[key][1, ..., 2, 1]
            assert not bins.any(), key
            expected[key][1, ..., 2, 1] = 0
        for key, tensor in expected.items():
            assert tensor.isfinite().all()
            torch.testing.assert_close(actual[key], tensor, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("sampling_ratio", [0, 2])
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
    @pytest.mark.parametrize("column", [1, 2, 3, 4])
    def test_rois(self, column: int, value: float, sampling_ratio: int, device: str) -> None:
        arguments = place(make(sampling_ratio=sampling_ratio), TYPES["fp32"], device)
        others = run({**arguments, "rois": arguments["rois"][:5], "offset": arguments["offset"][:5],
                      "mask": arguments["mask"][:5]})  # fmt: skip
        arguments["rois"][5, column] = value
        result = run(arguments)
        for key in ("output", "offset", "mask"):
            assert not result[key][5].any(), key
            assert torch.equal(result[key][:5], others[key]), key
        torch.testing.assert_close(result["input"], others["input"])

    def test_mask(self, device: str) -> None:
        """A NaN mask makes its own bin NaN, whether or not the bin has samples."""
        arguments = place(make(), TYPES["fp32"], device)
        arguments["mask"][1, 2, 0] = arguments["mask"][2, 1, 1] = math.nan
        arguments["offset"][2, :, 1, 1] = 1e9
        result = run(arguments)
        expected = arguments["mask"].isnan()[:, None].expand_as(result["output"])
        assert torch.equal(result["output"].isnan(), expected)
        assert result["mask"].isfinite().all()


@pytest.mark.emulated
class TestGrids:
    """How many samples a bin has, and where, for RoIs of any size."""

    @pytest.mark.parametrize("start", [-7003.2, -9991.7, 1.4], ids=str)
    @pytest.mark.parametrize("axis", [0, 1])
    def test_adaptive_grid_far_larger_than_the_image(
        self, axis: int, start: float, device: str
    ) -> None:
        """Only some samples can lie in the image; the mean is over all."""
        arguments = make(images=1, rois=1, size=(6, 6), sampling_ratio=0, output_size=(2, 2),
                         spatial_scale=1.0, gamma=1e-4)  # fmt: skip
        box = arguments["rois"][0, 1:].view(2, 2)
        box[:] = torch.tensor([[1.0], [4.0]])
        box[:, axis] = torch.tensor([start, start + 19999.4])
        samples = []  # of each bin, x and y: their share in each of the 6 rows or columns
        for i in range(2):
            begin, end = (box[:, i] - 0.5).tolist()
            size = (end - begin) / 2
            bins = torch.arange(2.0, dtype=torch.float64).view((1, 2) if i == 0 else (2, 1))
            first = begin + bins * size + 1e-4 * (end - begin) * arguments["offset"][0, i]
            grid = torch.arange(math.ceil(size)).double()
            position = first[..., None] + (grid + 0.5) * size / len(grid)
            kept = (position >= -1) & (position <= 6)
            tent = 1 - (position.clamp(0, 5)[..., None] - torch.arange(6)).abs()
            samples.append((tent.clamp(min=0) * kept[..., None]).mean(2))
        expected = torch.einsum("chw,pqh,pqw->cpq", arguments["input"][0], *samples[::-1])
        expected = expected * arguments["mask"]
        assert expected.abs().max() > 1e-5
        actual = deform_roi_pool(**place(arguments, TYPES["fp64"], device))
        torch.testing.assert_close(actual[0].cpu(), expected, rtol=1e-9, atol=1e-13)

    @pytest.mark.parametrize("types", ["fp32", "fp64"])
    @pytest.mark.parametrize("size", [1e6, 1e9, 1e15, 1e30, 3e38])
    @pytest.mark.parametrize("output_size", [(1, 1), (3, 2)], ids=str)
    def test_absurd_rois(self, output_size: tuple, size: float, types: str, device: str) -> None:
        """No hang, no overflow, nothing read outside: a mean of at most a few pixels."""
        arguments = place(
            make(images=1, rois=6, output_size=output_size, sampling_ratio=0, mask=False),
            TYPES[types], device,
        )  # fmt: skip
        boxes = [(-1, -1, 1, 1), (0, 0, 1, 1), (-1, -1, 0, 0), (-1, 0, 1, 0), (0, -1, 0, 1),
                 (1, 1, -1, -1)]  # fmt: skip
        box = torch.tensor([2.0, 3, 7, 9]) + size * torch.tensor(boxes)
        arguments["rois"][:, 1:] = box.to(device)
        result = run(arguments)
        for key, tensor in result.items():
            assert tensor.isfinite().all(), key
        assert result["output"].abs().max() <= arguments["input"].abs().max()
        assert not result["output"][5].any()

    def test_inverted_rois(self, device: str) -> None:
        """Without samples (adaptive grid) zero; else sampled from right to left."""
        arguments = place(make(rois=4, sampling_ratio=0), TYPES["fp64"], device)
        inverted = arguments["rois"].clone()
        inverted[:2, [1, 3]] = inverted[:2, [3, 1]]
        inverted[2, 4] = inverted[2, 2]
        adaptive = run({**arguments, "rois": inverted})
        for key in ("output", "offset", "mask"):
            assert not adaptive[key][:3].any(), key
            assert adaptive[key][3].any(), key
        fixed = {**arguments, "sampling_ratio": 2, "offset": None, "mask": None}
        straight = run(fixed)["output"]
        mirrored = arguments["rois"][:, [0, 3, 2, 1, 4]]
        torch.testing.assert_close(run({**fixed, "rois": mirrored})["output"], straight.flip(3))

    @pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
    def test_zero_offset_is_roi_align(self, sampling_ratio: int, device: str) -> None:
        ops = pytest.importorskip("mmcv.ops")
        arguments = place(make(rois=40, sampling_ratio=sampling_ratio, mask=False),
                          TYPES["fp32"], device)  # fmt: skip
        expected = ops.roi_align(
            arguments["input"].cpu(), arguments["rois"].cpu(), (3, 2), 0.25, sampling_ratio,
            "avg", True,
        )  # fmt: skip
        assert expected.std() > 0.3
        for offset in (None, torch.zeros_like(arguments["offset"])):
            actual = deform_roi_pool(**{**arguments, "offset": offset})
            torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5)

"""Position-sensitive pooling at and beyond the border, and other special arguments."""

import math

import pytest
import torch

from mmdeform.ops import deform_ps_roi_pool

from .contracts.operator import TYPES
from .test_deform_ps_roi_pool import TestContract as Contract
from .test_deform_ps_roi_pool import make, place, run, sampled


@pytest.mark.emulated
class TestEdges:
    def test_border(self, device: str) -> None:
        """Samples up to the outer edges of the border pixels are clamped, the others left out."""
        height, width, little = 4, 6, 2.0**-12
        inside = [(-0.5, 2), (3.5, 2), (1, -0.5), (1, 5.5), (-0.5, -0.5), (-0.25, 2), (3.25, 2.5)]
        outside = [(-0.5 - little, 2), (3.5 + little, 2), (1, -0.5 - little), (1, 5.5 + little)]
        result = run(sampled(height, width, inside + outside, device))
        values = [12, 21, 13, 18, 10, 12, 21.5] + [0] * 4
        assert result["output"].flatten().tolist() == values
        # (x, y): only where a coordinate is not clamped does it change the value.
        slopes = [(1, 0), (1, 0), (0, 3), (0, 3), (0, 0), (1, 0), (1, 0)] + [(0, 0)] * 4
        assert result["offset"].flatten(1).tolist() == [list(slope) for slope in slopes]

    def test_integer_positions_have_the_right_sided_gradient(self, device: str) -> None:
        arguments = sampled(3, 5, [(1, 2), (0, 0), (2, 4), (2, 1), (0, 4)], device)
        arguments["input"].square_()
        pixels = arguments["input"][0, 0].cpu()
        result = run(arguments)
        slopes = [
            [pixels[1, 3] - pixels[1, 2], pixels[2, 2] - pixels[1, 2]],
            [pixels[0, 1] - pixels[0, 0], pixels[1, 0] - pixels[0, 0]],
            [0, 0],
            [pixels[2, 2] - pixels[2, 1], 0],
            [0, pixels[1, 4] - pixels[0, 4]],
        ]
        assert result["offset"].flatten(1).tolist() == slopes

    @pytest.mark.parametrize(
        "position", [(-0.4, 2.3), (3.3, 2.3), (1.3, -0.3), (1.3, 5.3), (3.4, 5.4)], ids=str
    )
    @pytest.mark.parametrize("samples", [1, 2])
    def test_gradcheck_where_samples_are_clamped(
        self, position: tuple, samples: int, device: str
    ) -> None:
        arguments = sampled(4, 6, [position], device)
        arguments["input"] = torch.randn_like(arguments["input"])
        arguments["sample_per_part"] = samples
        offset = arguments.pop("offset").requires_grad_()
        assert torch.autograd.gradcheck(
            lambda offset: deform_ps_roi_pool(offset=offset, **arguments), offset, nondet_tol=1e-12
        )

    def test_mean_is_over_the_samples_that_are_kept(self, device: str) -> None:
        """Two of four samples lie left of the image: the mean is that of the other two."""
        arguments = sampled(4, 6, [(1, -1.25)], device)
        arguments["sample_per_part"] = 2  # columns -1.25 and -0.25, rows 1 and 2
        assert run(arguments)["output"].item() == (13 + 16) / 2

    @pytest.mark.parametrize(
        ("value", "rounded"), [(2.5, 3), (3.5, 4), (-2.5, -3), (-0.5, -1), (0.5, 1), (2.49, 2),
                               (0.49999997, 0), (-1.51, -2)]
    )  # fmt: skip
    @pytest.mark.parametrize("column", [1, 2, 3, 4])
    @pytest.mark.parametrize("types", ["fp32", "fp64"])
    def test_rois_are_rounded_as_in_c(
        self, value: float, rounded: int, column: int, types: str, device: str
    ) -> None:
        """Halves away from zero; torch.round and a mere floor(v + 0.5) would differ."""
        arguments = place(make(spatial_scale=0.5), TYPES[types], device)
        # A second corner left of the image: the offsets move its bins to the right of it.
        arguments["offset"][:] = 5.0 if column > 2 else 0.0
        arguments["rois"][:, 1:] = torch.tensor([-12.0, -12, 10, 10])
        arguments["rois"][:, column] = value
        actual = deform_ps_roi_pool(**arguments)
        arguments["rois"][:, column] = rounded
        assert torch.equal(actual, deform_ps_roi_pool(**arguments))
        arguments["rois"][:, column] = rounded - 1
        assert not torch.equal(actual, deform_ps_roi_pool(**arguments))

    def test_rois_have_a_smallest_size(self, device: str) -> None:
        """0.1 pixel, also of inverted RoIs: the second of two samples lies 0.05 behind."""
        arguments = sampled(4, 6, [(1, 2)], device)
        arguments.update(trans_std=1.0, offset=None, sample_per_part=2)
        arguments["rois"][0, 1:] = torch.tensor([2, 1, -7, 0], device=device)
        expected = 10 + 3 * (0.5 + 0.025) + 1.5 + 0.025
        assert run(arguments)["output"].item() == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
    @pytest.mark.parametrize("value", [1e9, -1e9, math.nan, math.inf, -math.inf], ids=str)
    @pytest.mark.parametrize("axis", [0, 1])
    def test_offsets_far_outside(self, value: float, axis: int, types: tuple, device: str) -> None:
        """Such bins are zero, get no gradient and leave the others alone."""
        good = place(make(part_size=2, output_size=(3, 2)), types, device)
        bad = dict(good, offset=good["offset"].clone())
        bad["offset"][1, 2 + axis, 1, 0] = value  # the second class; row 2, column 0
        actual, expected = run(bad), run(good)
        assert not actual["output"][1, 2:4, 2, 0].any()
        assert not actual["offset"][1, 2:4, 1, 0].any()
        expected["output"][1, 2:4, 2, 0] = 0
        expected["offset"][1, 2:4, 1, 0] = 0
        for key in ("output", "offset"):
            torch.testing.assert_close(actual[key], expected[key])
        assert actual["input"].isfinite().all()

    @pytest.mark.parametrize("classes", [None, 2])
    @pytest.mark.parametrize(
        ("column", "value"),
        # A RoI that ends at minus infinity is as small as one that ends before it begins.
        [(i, v) for i in range(1, 5) for v in (math.nan, math.inf, -math.inf)
         if i < 3 or v != -math.inf],
    )  # fmt: skip
    def test_rois_that_are_not_finite(
        self, column: int, value: float, classes: int | None, device: str
    ) -> None:
        arguments = place(make(classes=classes), TYPES["fp32"], device)
        others = dict(arguments, rois=arguments["rois"][:5])
        if classes is not None:
            others["offset"] = arguments["offset"][:5]
        others = run(others)
        arguments["rois"][5, column] = value
        result = run(arguments)
        for key in result.keys() - {"input"}:
            assert not result[key][5].any(), key
            assert torch.equal(result[key][:5], others[key]), key
        torch.testing.assert_close(result["input"], others["input"])

    @pytest.mark.parametrize("size", [1e6, 1e9, 1e30, 3e38])
    def test_absurd_rois(self, size: float, device: str) -> None:
        arguments = place(make(rois=5, classes=1), TYPES["fp32"], device)
        boxes = [(-1, -1, 1, 1), (0, 0, 1, 1), (-1, -1, 0, 0), (-1, 0, 1, 0), (1, 1, -1, -1)]
        box = torch.tensor([2.0, 3, 7, 9]) + size * torch.tensor(boxes)
        arguments["rois"][:, 1:] = box.to(device)
        result = run(arguments)
        for key, tensor in result.items():
            assert tensor.isfinite().all(), key
        assert result["output"].abs().max() <= arguments["input"].abs().max()

    @pytest.mark.parametrize("types", TYPES)
    @pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
    def test_bad_pixels_stay_where_they_are(self, bad: float, types: str, device: str) -> None:
        """A pixel that is not finite reaches exactly the samples that touch it."""
        positions = [(1.5, 1.5), (2.5, 2.5), (2.25, 3.75), (0.5, 3.5), (9, 9), (2.5, -0.25)]
        arguments = sampled(4, 6, positions, device, types)
        arguments["input"][0, 0, 1, 1] = bad
        arguments["input"][0, 0, 0, 0] = bad  # clamped addresses would come here
        result = run(arguments)
        touched = torch.tensor([True] + [False] * 5)
        for key in ("output", "offset"):
            assert torch.equal(~result[key].flatten(1).isfinite().all(1).cpu(), touched), key
        assert result["input"].isfinite().all()

    @pytest.mark.parametrize("classes", [None, 2])
    def test_zero_rois_keep_a_graph(self, classes: int | None, device: str) -> None:
        arguments = Contract().place(make(rois=0, classes=classes), TYPES["fp32"], device)
        output = deform_ps_roi_pool(**arguments)
        assert output.shape == (0, 6, 3, 2)
        (output.sum() + arguments["input"].sum()).backward()
        assert torch.equal(arguments["input"].grad, torch.ones_like(arguments["input"]))
        assert classes is None or arguments["offset"].grad.shape == (0, 4, 4, 4)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_sums_are_wider_than_16_bits(self, dtype: torch.dtype, device: str) -> None:
        """4096 bins of one pixel: a sum in bf16 would stop at 256, one in fp16 at 2048."""
        arguments = sampled(1, 1, [(0, 0)] * 4096, device)
        assert run(place(arguments, (dtype, dtype), device))["input"].item() == 4096

    def test_rois_stay_fp32_beside_half_data(self, device: str) -> None:
        """At 1333 pixels a bf16 RoI would be off by up to four."""
        arguments = sampled(1, 1400, [(-0.5, -0.5)], device)
        arguments.update(offset=None)
        arguments["input"][:] = torch.arange(1400, device=device) % 2
        arguments["rois"][0, [1, 3]] = 1333
        for dtype in (torch.float16, torch.bfloat16):
            half = {**arguments, "input": arguments["input"].to(dtype)}
            assert deform_ps_roi_pool(**half).item() == 0.5
            half["rois"] = torch.tensor([[0.0, 1333, 0, 1334, 1]], device=device)
            half["sample_per_part"] = 2  # at 1332.5 and 1333.5, rows 0
            assert deform_ps_roi_pool(**half).item() == 0.5
            with torch.autocast(device, dtype):
                cast = {**arguments, "input": arguments["input"].float()}
                assert deform_ps_roi_pool(**cast).item() == 0.5

    def test_integer_stands_for_a_pair(self, device: str) -> None:
        arguments = place(make(output_size=(3, 3)), TYPES["fp32"], device)
        expected = deform_ps_roi_pool(**arguments)
        assert torch.equal(deform_ps_roi_pool(**{**arguments, "output_size": 3}), expected)

"""Statistics of known samples."""

import math

import pytest
import torch

pytest.importorskip("mmcv.ops")

from mmdeform.engine.hooks import offset_statistics
from mmdeform.layers import (
    DCNv3,
    DCNv4,
    DeformConv2d,
    DeformRoIPool,
    MultiScaleDeformableAttention,
)
from mmdeform.layers.sampling import Sampling, sampled

from .training import dcn, statistics


class TestStatistics:
    def test_known_offsets(self) -> None:
        values = statistics(sampled(dcn(), (torch.zeros(1, 2, 6, 30),)), percentiles=(25, 100))
        assert list(values) == ["p25", "p100", "max", "outside", "mask_mean", "mask_saturated"]
        assert values["p25"] == 2 and values["p100"] == values["max"] == 8
        assert values["mask_mean"] == pytest.approx((8 * 0.5 + 1) / 9)
        assert values["mask_saturated"] == pytest.approx(1 / 9)

    def test_samples_outside(self) -> None:
        # Of 4 x 5 pixels those of the last column are moved by one: beyond the map.
        offset = torch.zeros(1, 2, 4, 5)
        offset[:, 1] = 1.0
        sampling = sampled(DeformConv2d(1, 1, 1), (torch.zeros(1, 1, 4, 5), offset))
        values = statistics(sampling)
        assert values["outside"] == pytest.approx(4 / 20) and "mask_mean" not in values

    def test_entropy(self) -> None:
        layer = DCNv3(4, 4, 3, padding=1)
        x = torch.randn(1, 4, 5, 5)
        assert statistics(sampled(layer, (x,)))["entropy"] == pytest.approx(1)
        layer.mask.bias.data[:2] = 50.0  # two taps of equal weight
        two = statistics(sampled(layer, (x,)))
        assert two["entropy"] == pytest.approx(math.log(2) / math.log(9))
        assert "mask_mean" not in two and "mask_saturated" not in two
        layer.mask.bias.data[:2] = torch.tensor([500.0, 0.0])
        assert statistics(sampled(layer, (x,)))["entropy"] == pytest.approx(0, abs=1e-6)

    def test_entropy_of_attention(self) -> None:
        layer = MultiScaleDeformableAttention(16, 2, 2, 3)
        inputs = dict(
            query=torch.randn(5, 1, 16),
            reference_points=torch.rand(1, 5, 2, 2),
            spatial_shapes=torch.tensor([[4, 4], [2, 2]]),
        )
        layer.attention_weights.bias.data.view(2, 2, 3)[:, 1] = -500.0  # the first level alone
        values = statistics(sampled(layer, (), inputs))
        assert values["entropy"] == pytest.approx(math.log(3) / math.log(6))
        assert values["max"] == pytest.approx(3)

    def test_unbounded_weights_have_no_saturation(self) -> None:
        values = statistics(sampled(DCNv4(4, 4, 3, padding=1), (torch.zeros(1, 4, 5, 5),)))
        assert values["mask_mean"] == pytest.approx(1 / 9)
        assert "mask_saturated" not in values and "entropy" not in values

    def test_calls_are_merged(self) -> None:
        layer = dcn()
        small, large = (sampled(layer, (torch.zeros(1, 2, 6, w),)) for w in (2, 40))
        merged, whole = statistics(small, large), statistics(large)
        share = (2 * statistics(small)["outside"] + 40 * whole["outside"]) / 42
        assert merged["outside"] == pytest.approx(share) and merged["outside"] != whole["outside"]
        assert merged["p50"] == 4 and merged["max"] == 8

    def test_no_samples(self) -> None:
        layer = DeformRoIPool((2, 2))
        empty = sampled(layer, (torch.zeros(1, 2, 6, 6), torch.zeros(0, 5)))
        assert statistics(empty) == {}

    def test_many_samples_are_drawn_in_proportion(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(offset_statistics, "MAX_SAMPLES", 2000)
        torch.manual_seed(3)
        sizes = (30_000, 1_000, 9_000)
        lengths = [torch.rand(size) + index for index, size in enumerate(sizes)]
        samplings = [
            Sampling(
                offset=torch.stack([length, torch.zeros_like(length)], -1),
                locations=torch.zeros(len(length), 2),
                grid=torch.zeros(2),
                size=torch.ones(2),
            )
            for length in lengths
        ]
        state = torch.get_rng_state()
        values = statistics(*samplings, percentiles=(50, 70, 90))
        assert torch.equal(torch.get_rng_state(), state)
        true = torch.cat(lengths)
        assert values["max"] == true.max()
        for percentile in (50, 70, 90):
            rank = (true < values[f"p{percentile}"]).float().mean()
            assert rank == pytest.approx(percentile / 100, abs=0.03)

"""FLOP counts of whole layers in mmengine's counter against sums done by hand."""

import pytest
import torch
from mmengine.analysis import FlopAnalyzer, get_model_complexity_info
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mmdeform.analysis.flops  # noqa: F401
from mmdeform import layers


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_deform_conv2d(version):
    cls = layers.DeformConv2dPack if version == "v1" else layers.ModulatedDeformConv2dPack
    layer = cls(8, 12, 3, stride=2, padding=1, groups=2, deform_groups=2)
    pixels = 4 * 5  # outputs of a 7 x 9 map
    offset_channels = 2 * 9 * (2 if version == "v1" else 3)
    offset_conv = pixels * offset_channels * 8 * 9
    product = pixels * 12 * (8 // 2) * 9
    sampling = pixels * 8 * 9 * (4 if version == "v1" else 5)  # bilinear, and the mask
    result = get_model_complexity_info(layer, (8, 7, 9))
    assert result["flops"] == offset_conv + product + sampling
    assert result["activations"] == pixels * (offset_channels + 12)
    counts = FlopAnalyzer(layer, torch.randn(1, 8, 7, 9)).by_operator()
    assert counts == {"conv": offset_conv, "deform_conv2d": product + sampling}
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(1, 8, 7, 9))
    assert counter.get_total_flops() == 2 * result["flops"]


class Attention(nn.Module):
    """Attention with its geometry, so that the counter has a single tensor to pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = layers.MultiScaleDeformableAttention(32, 4, 2, 3, batch_first=True)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.layer(
            value[:, :5],
            value=value,
            reference_points=torch.full((1, 5, 2, 2), 0.5),
            spatial_shapes=torch.tensor([[4, 3], [2, 2]]),
        )


def test_ms_deform_attn():
    samples = 5 * 4 * 2 * 3
    linear = 5 * 32 * (4 * 2 * 3 * 3) + 16 * 32 * 32 + 5 * 32 * 32
    result = get_model_complexity_info(Attention(), inputs=(torch.randn(1, 16, 32),))
    assert result["flops"] == linear + samples * 8 * 5
    assert result["activations"] == 5 * 4 * 2 * 3 * 3 + 16 * 32 + 5 * 32 + 5 * 32

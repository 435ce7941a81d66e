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


@pytest.mark.parametrize("remove_center", [False, True])
@pytest.mark.parametrize("version", ["v3", "v4"])
def test_depthwise_layers(version, remove_center):
    cls = layers.DCNv3 if version == "v3" else layers.DCNv4
    layer = cls(16, 12, 3, stride=2, padding=1, group=2, remove_center=remove_center)
    x = torch.randn(1, 16, 7, 9)
    pixels, taps = 4 * 5, 8 if remove_center else 9
    channels = 3 * 2 * taps if version == "v3" else (3 * 2 * taps + 7) // 8 * 8
    expected = {
        "linear": 7 * 9 * 16 * 16 + pixels * 16 * channels + pixels * 16 * 12,
        f"dcn{version}": pixels * 16 * taps * 5,  # bilinear, and the weight
    }
    if version == "v3":
        expected |= {"conv": pixels * 16 * 9, "layer_norm": pixels * 16 * 5}
    counts = FlopAnalyzer(layer, x).by_operator()
    assert {name: count for name, count in counts.items() if count} == expected
    assert get_model_complexity_info(layer, (16, 7, 9))["flops"] == sum(expected.values())


@pytest.mark.parametrize("head", ["mmcv", "paper"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_deform_roi_pool(version, head):
    cls = layers.DeformRoIPoolPack if version == "v1" else layers.ModulatedDeformRoIPoolPack
    layer = cls((3, 2), 4, deform_fc_channels=5, sampling_ratio=2, head=head)
    rois = torch.tensor([[0.0, 1, 1, 5, 5]] * 7)
    widths = {  # of the fully connected layers
        "v1 mmcv": [(24, 5), (5, 5), (5, 12)],
        "v1 paper": [(24, 12)],
        "v2 mmcv": [(24, 5), (5, 5), (5, 12), (24, 5), (5, 6)],
        "v2 paper": [(24, 5), (5, 5), (5, 18)],
    }[f"{version} {head}"]
    values = 7 * 4 * 6
    # Each sample is bilinear; every value is divided, and multiplied by the mask, which are half a
    # multiply-add each.
    first, second = values * 4 * 4 + values // 2, values * 4 * 4 + values // 2
    second += values // 2 if version == "v2" else 0
    counts = FlopAnalyzer(layer, (torch.randn(1, 4, 9, 9), rois)).by_operator()
    assert counts["linear"] == 7 * sum(a * b for a, b in widths)
    assert counts["deform_roi_pool"] == first + second


def test_deform_ps_roi_pool():
    layer = layers.DeformPSRoIPoolPack(5, 3, 1.0, 4, num_classes=2, sample_per_part=2)
    rois = torch.tensor([[0.0, 1, 1, 5, 5]] * 7)
    tensors = (torch.randn(1, 4 * 9, 8, 8), rois, torch.randn(1, 5, 8, 8))
    counts = FlopAnalyzer(layer, tensors).by_operator()
    values = 7 * 4 * 9  # of offsets and of scores: twice two channels, and four
    assert counts == {"conv": 64 * 5 * 36, "deform_ps_roi_pool": 2 * (values * 4 * 4 + values // 2)}


@pytest.mark.parametrize("bias", ["relative", "depthwise", "fixed", None], ids=str)
def test_dat_attn(bias):
    layer = layers.DeformableAttention2d(12, 6, 3, feat_size=(8, 6), stride=2, position_bias=bias)
    x = torch.randn(1, 12, 8, 6)
    queries, keys = 8 * 6, 4 * 3
    convs = 2 * (queries + keys) * 12 * 12  # q and out, k and v
    convs += keys * 12 * (25 + 2)  # of the offsets
    convs += queries * 12 * 9 if bias == "depthwise" else 0
    attention = {"relative": "dat_attn", "fixed": "matmul"}
    expected = {
        "conv": convs,
        attention.get(bias, "scaled_dot_product_attention"): 2 * queries * keys * 12,
        "ms_deform_attn": keys * 12 * 5,
    }
    counts = FlopAnalyzer(layer, x).by_operator()
    assert counts == expected | {"layer_norm": keys * 12 * 5}
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * sum(expected.values())
    if bias is None:
        # Weights once more, their gradient, and those of query, key and value.
        with FlopCounterMode(display=False) as counter:
            layer(x).sum().backward()
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        assert counter.get_flop_counts()["Global"][backward] == 2 * 5 * queries * keys * 12

"""Layer normalisation of maps, alone and as a ``norm_cfg``."""

import pytest
import torch

pytest.importorskip("mmcv.ops")
from mmcv.cnn import ConvModule
from torch import nn

from mmdeform.layers import LN2d
from mmdeform.layers.layer_norm import LayerNorm2d


def scrambled(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.double()


def test_channels_of_each_pixel_are_normalised() -> None:
    norm = scrambled(LN2d(5, eps=1e-3))
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    mean, variance = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
    weight, bias = norm.weight.view(1, 5, 1, 1), norm.bias.view(1, 5, 1, 1)
    y = norm(x)
    torch.testing.assert_close(y, (x - mean) / (variance + 1e-3).sqrt() * weight + bias)
    assert y.is_contiguous()


def test_dats_norm_computes_the_same() -> None:
    norm, dats = scrambled(LN2d(5)), LayerNorm2d(5).double()
    dats.norm.load_state_dict(norm.state_dict())
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    assert torch.equal(norm(x), dats(x))


def test_a_convolution_calls_it_as_published() -> None:
    block = scrambled(ConvModule(3, 5, 1, norm_cfg=dict(type="mmdeform.LN2d"), act_cfg=None))
    assert list(block.state_dict()) == ["conv.weight", "ln.weight", "ln.bias"]
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    assert torch.equal(block(x), block.ln(block.conv(x)))

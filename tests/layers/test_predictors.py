"""The named submodules and channels are those that offsets and masks come from."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmcv.ops")
from mmcv.ops import DeformConv2dPack as MmcvDCN
from mmcv.ops import ModulatedDeformConv2dPack as MmcvDCNv2
from mmcv.ops import ModulatedDeformRoIPoolPack as MmcvRoIPoolPack
from mmcv.ops import MultiScaleDeformableAttention as MmcvAttention

from mmdeform.layers import (
    DCNv3,
    DCNv4,
    DeformableAttention2d,
    DeformConv2d,
    DeformConv2dPack,
    DeformPSRoIPoolPack,
    DeformRoIPoolPack,
    ModulatedDeformConv2dPack,
    ModulatedDeformRoIPoolPack,
    MultiScaleDeformableAttention,
)
from mmdeform.layers.predictors import initial_offset, predictors
from mmdeform.layers.sampling import sampled

MAP = torch.randn(1, 32, 8, 8)
ROIS = torch.tensor([[0.0, 1, 1, 6, 6], [0, 2, 0, 7, 5]])
ATTENTION = dict(
    query=torch.randn(5, 1, 16),
    reference_points=torch.rand(1, 5, 2, 2),
    spatial_shapes=torch.tensor([[4, 4], [2, 2]]),
)


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (DeformConv2dPack(32, 4, 3, deform_groups=2), dict(x=MAP)),
        (ModulatedDeformConv2dPack(32, 4, 3, deform_groups=2), dict(x=MAP)),
        (MmcvDCN(32, 4, (1, 3)), dict(x=MAP)),
        (MmcvDCNv2(32, 4, (1, 3), deform_groups=2), dict(x=MAP)),
        (DCNv3(32, 4, 3), dict(x=MAP)),
        (DCNv4(32, 4, 3, remove_center=True), dict(x=MAP)),
        (DeformableAttention2d(32, 4, 2, stride=2), dict(x=MAP)),
        (MultiScaleDeformableAttention(16, 2, 2, 3), ATTENTION),
        (MmcvAttention(16, 2, 2, 3), ATTENTION),
        (DeformRoIPoolPack(2, 32, 8), dict(input=MAP, rois=ROIS)),
        (DeformRoIPoolPack(2, 32, 8, head="paper"), dict(input=MAP, rois=ROIS)),
        (ModulatedDeformRoIPoolPack(2, 32, 8), dict(input=MAP, rois=ROIS)),
        (ModulatedDeformRoIPoolPack(2, 32, 8, head="paper"), dict(input=MAP, rois=ROIS)),
        (DeformPSRoIPoolPack(32, 2, 1.0, 8), dict(input=MAP, rois=ROIS, features=MAP)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_channels(layer: nn.Module, inputs: dict[str, Any]) -> None:
    """Noise in the named channels of offsets moves every sample, and no mask; and vice versa."""
    found = predictors(layer)
    assert all(predictor.module is getattr(layer, predictor.name) for predictor in found)
    plain = sampled(layer, (), inputs)

    def disturbed(offsets: bool) -> Any:
        def add(module: nn.Module, args: Any, output: Tensor, predictor: Any) -> Tensor:
            assert len(predictor.is_offset) == output.shape[predictor.channel_dim]
            channels = (predictor.is_offset == offsets).view(-1, *(1,) * ~predictor.channel_dim)
            return output + torch.rand_like(output) * channels

        handles = [
            predictor.module.register_forward_hook(
                lambda *args, predictor=predictor: add(*args, predictor)
            )
            for predictor in found
        ]
        try:
            return sampled(layer, (), inputs)
        finally:
            for handle in handles:
                handle.remove()

    moved = disturbed(offsets=True)
    assert (moved.offset != plain.offset).all()
    assert plain.mask is None or torch.equal(moved.mask, plain.mask)
    weighed = disturbed(offsets=False)
    assert torch.equal(weighed.offset, plain.offset)
    assert plain.mask is None or (weighed.mask != plain.mask).all()


def test_layers_that_take_offsets_predict_nothing() -> None:
    assert predictors(DeformConv2d(1, 1, 1)) == [] and predictors(nn.Conv2d(1, 1, 1)) == []


def test_mmcvs_modulated_pooling() -> None:
    found = predictors(MmcvRoIPoolPack((2, 3), 4, 8))
    assert [(p.name, int(p.is_offset.sum()), len(p.is_offset)) for p in found] == [
        ("offset_fc", 12, 12),
        ("mask_fc", 0, 6),
    ]


@pytest.mark.parametrize("kind", [MultiScaleDeformableAttention, MmcvAttention])
def test_initial_offset_of_attention(kind: type) -> None:
    fresh = kind(16, 2, 2, 3).sampling_offsets.bias.detach()
    layer = kind(16, 2, 2, 3).half()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    numbers = torch.get_rng_state()
    torch.testing.assert_close(initial_offset(layer), fresh)
    assert torch.equal(torch.get_rng_state(), numbers)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, state[name])


def test_initial_offset_of_others_is_zero() -> None:
    assert initial_offset(DeformConv2dPack(1, 1, 1)) is None

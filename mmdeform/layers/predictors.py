"""Which submodules of a deformable layer predict its offsets and masks, and in which channels."""

import copy
import functools
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from mmcv.ops import SAConv2d
from mmcv.ops import deform_conv as mmcv_v1
from mmcv.ops import modulated_deform_conv as mmcv_v2
from mmcv.ops import multi_scale_deform_attn as mmcv_msda
from torch import Tensor, nn

from .dat_attn import DeformableAttention2d
from .dcnv3 import DCNv3
from .dcnv4 import DCNv4
from .deform_ps_roi_pool import DeformPSRoIPoolPack

__all__ = ["Predictor", "initial_offset", "predictors"]

# mmcv.ops.deform_roi_pool is the function of this name, which hides its module.
_mmcv_roi = importlib.import_module("mmcv.ops.deform_roi_pool")


@dataclass(frozen=True)
class Predictor:
    """A submodule whose output is offsets, masks before their activation, or both.

    Attributes:
        name: Its name in the layer.
        module: The submodule.
        is_offset: For each channel of its output whether it is an offset, bool, shape (channels,);
            the others belong to masks.
        channel_dim: Dimension of the channels in its output, counted from the end.
    """

    name: str
    module: nn.Module
    is_offset: Tensor
    channel_dim: int


@functools.singledispatch
def predictors(module: nn.Module) -> list[Predictor]:
    """What predicts the offsets and masks of a layer; nothing where they are inputs."""
    return []


def initial_offset(module: nn.Module) -> Tensor | None:
    """What a fresh layer of this kind predicts as offsets, whatever ``module`` has learned.

    Returns:
        None for zeros, also for DAT, whose offsets start at random. For multi-scale deformable
        attention the pattern of points around the reference, in the order of the output of
        ``sampling_offsets``, fp32, shape (channels,).
    """
    if not isinstance(module, mmcv_msda.MultiScaleDeformableAttention):
        return None
    with torch.random.fork_rng(devices=[]):  # its projections are initialised as well
        fresh = copy.deepcopy(module).cpu().float()
        fresh.init_weights()
    return fresh.sampling_offsets.bias.detach()


def _predictor(layer: Any, name: str, offsets: int, masks: int = 0, dim: int = -1) -> Predictor:
    """``offsets`` channels of offsets, followed by ``masks`` channels of masks."""
    is_offset = torch.arange(offsets + masks) < offsets
    return Predictor(name, getattr(layer, name), is_offset, dim)


@predictors.register(mmcv_v1.DeformConv2dPack)
@predictors.register(mmcv_v2.ModulatedDeformConv2dPack)
def _conv_pack(module: Any) -> list[Predictor]:
    points = module.deform_groups * module.kernel_size[0] * module.kernel_size[1]
    masks = points if isinstance(module, mmcv_v2.ModulatedDeformConv2dPack) else 0
    return [_predictor(module, "conv_offset", 2 * points, masks, dim=-3)]


@predictors.register(SAConv2d)
def _switchable_conv(module: Any) -> list[Predictor]:
    if not module.use_deform:
        return []
    return [
        _predictor(module, name, getattr(module, name).out_channels, dim=-3)
        for name in ("offset_s", "offset_l")
    ]


@predictors.register(DCNv3)
def _dcnv3(module: Any) -> list[Predictor]:
    points = module.group * module.taps
    return [_predictor(module, "offset", 2 * points), _predictor(module, "mask", 0, points)]


@predictors.register(DCNv4)
def _dcnv4(module: Any) -> list[Predictor]:
    # Of each group first the offsets, then the masks; unused channels follow.
    is_offset = torch.zeros(module.offset_mask.out_features, dtype=torch.bool)
    used = is_offset[: 3 * module.group * module.taps].view(module.group, 3 * module.taps)
    used[:, : 2 * module.taps] = True
    return [Predictor("offset_mask", module.offset_mask, is_offset, -1)]


@predictors.register(mmcv_msda.MultiScaleDeformableAttention)
def _attention(module: Any) -> list[Predictor]:
    return [
        _predictor(module, "sampling_offsets", module.sampling_offsets.out_features),
        _predictor(module, "attention_weights", 0, module.attention_weights.out_features),
    ]


@predictors.register(DeformableAttention2d)
def _dat(module: Any) -> list[Predictor]:
    return [_predictor(module, "conv_offset", 2, dim=-3)] if module.use_offsets else []


@predictors.register(_mmcv_roi.DeformRoIPoolPack)
@predictors.register(_mmcv_roi.ModulatedDeformRoIPoolPack)
def _roi_pack(module: Any) -> list[Predictor]:
    bins = module.output_size[0] * module.output_size[1]
    if hasattr(module, "mask_fc"):
        return [
            _predictor(module, "offset_fc", 2 * bins),
            _predictor(module, "mask_fc", 0, bins),
        ]
    modulated = isinstance(module, _mmcv_roi.ModulatedDeformRoIPoolPack)
    return [_predictor(module, "offset_fc", 2 * bins, bins if modulated else 0)]


@predictors.register(DeformPSRoIPoolPack)
def _ps_roi_pack(module: Any) -> list[Predictor]:
    return [_predictor(module, "conv_offset", module.conv_offset.out_channels, dim=-3)]

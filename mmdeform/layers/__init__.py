"""Layers: published classes, state dicts and arguments on the operators of ``mmdeform.ops``."""

from .dat_attn import DeformableAttention2d
from .dcnv3 import DCNv3
from .dcnv4 import DCNv4
from .deform_conv2d import (
    DeformConv2d,
    DeformConv2dPack,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
)
from .deform_ps_roi_pool import DeformPSRoIPool, DeformPSRoIPoolPack
from .deform_roi_pool import DeformRoIPool, DeformRoIPoolPack, ModulatedDeformRoIPoolPack
from .layer_norm import LN2d
from .ms_deform_attn import MultiScaleDeformableAttention
from .offset_layers import OffsetConv2d, OffsetLinear
from .single_level_deform_attn import SingleLevelDeformableAttention

__all__ = [
    "DCNv3",
    "DCNv4",
    "DeformConv2d",
    "DeformConv2dPack",
    "DeformPSRoIPool",
    "DeformPSRoIPoolPack",
    "DeformRoIPool",
    "DeformRoIPoolPack",
    "DeformableAttention2d",
    "LN2d",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
    "ModulatedDeformRoIPoolPack",
    "MultiScaleDeformableAttention",
    "OffsetConv2d",
    "OffsetLinear",
    "SingleLevelDeformableAttention",
]

"""Layers: mmcv's classes, state dicts and arguments on the operators of ``mmdeform.ops``."""

from .deform_conv2d import (
    DeformConv2d,
    DeformConv2dPack,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
    OffsetConv2d,
)
from .ms_deform_attn import MultiScaleDeformableAttention

__all__ = [
    "DeformConv2d",
    "DeformConv2dPack",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
    "MultiScaleDeformableAttention",
    "OffsetConv2d",
]

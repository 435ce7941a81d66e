"""Operators as functions; needs torch alone."""

from . import _library
from .dat_attn import dat_attn, dat_attn_reference, dat_sample
from .dcnv3 import dcnv3, dcnv3_reference
from .dcnv4 import dcnv4, dcnv4_reference
from .deform_conv2d import deform_conv2d, deform_conv2d_reference
from .deform_ps_roi_pool import deform_ps_roi_pool, deform_ps_roi_pool_reference
from .deform_roi_pool import deform_roi_pool, deform_roi_pool_reference
from .ms_deform_attn import ms_deform_attn, ms_deform_attn_reference

_library.load()

__all__ = [
    "dat_attn",
    "dat_attn_reference",
    "dat_sample",
    "dcnv3",
    "dcnv3_reference",
    "dcnv4",
    "dcnv4_reference",
    "deform_conv2d",
    "deform_conv2d_reference",
    "deform_ps_roi_pool",
    "deform_ps_roi_pool_reference",
    "deform_roi_pool",
    "deform_roi_pool_reference",
    "ms_deform_attn",
    "ms_deform_attn_reference",
]

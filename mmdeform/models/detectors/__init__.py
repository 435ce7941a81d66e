"""Detectors."""

from .deformable_detr import DeformableDETR
from .rfcn import RFCN

__all__ = ["RFCN", "DeformableDETR"]

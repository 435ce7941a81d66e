"""Detectors."""

from .deformable_detr import DeformableDETR
from .two_stage import FasterRCNN, MaskRCNN

__all__ = ["DeformableDETR", "FasterRCNN", "MaskRCNN"]

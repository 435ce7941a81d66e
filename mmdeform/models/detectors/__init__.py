"""Detectors."""

from .deformable_detr import DeformableDETR
from .rfcn import RFCN
from .two_stage import FasterRCNN, MaskRCNN

__all__ = ["RFCN", "DeformableDETR", "FasterRCNN", "MaskRCNN"]

"""Backbones. They need mmengine and mmcv, not mmdet."""

from .dat import DAT
from .intern_image import FlashInternImage, InternImage

__all__ = ["DAT", "FlashInternImage", "InternImage"]

"""Backbones. They need mmengine and mmcv, not mmdet."""

from .dat import DAT

__all__ = ["DAT"]

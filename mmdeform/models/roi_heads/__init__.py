"""Heads that look at regions of interest."""

from .mimicking_roi_head import MimickingRoIHead

__all__ = ["MimickingRoIHead"]

"""Heads that look at regions of interest."""

from .mimicking_roi_head import MimickingRoIHead
from .rfcn_bbox_head import RFCNBBoxHead
from .rfcn_roi_head import RFCNRoIHead

__all__ = ["MimickingRoIHead", "RFCNBBoxHead", "RFCNRoIHead"]

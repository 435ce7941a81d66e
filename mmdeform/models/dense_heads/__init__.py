"""Heads that predict on whole feature maps."""

from .class_aware_rpn_head import ClassAwareRPNHead
from .rpn_head import RPNHead

__all__ = ["ClassAwareRPNHead", "RPNHead"]

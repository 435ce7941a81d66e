"""Heads that predict on whole feature maps."""

from .rpn_head import RPNHead

__all__ = ["RPNHead"]

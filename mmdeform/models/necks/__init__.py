"""Necks."""

from .top_reduction import TopReduction

__all__ = ["TopReduction"]

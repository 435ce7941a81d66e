"""Optimizer constructors."""

from .offset_lr_constructor import OffsetLrConstructor

__all__ = ["OffsetLrConstructor"]

"""Optimizer constructors."""

from .layer_decay_constructor import LayerDecayConstructor
from .offset_lr_constructor import OffsetLrConstructor

__all__ = ["LayerDecayConstructor", "OffsetLrConstructor"]

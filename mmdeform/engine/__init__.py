"""What a config adds to training: hooks and optimizer constructors."""

from .optimizers import OffsetLrConstructor

__all__ = ["OffsetLrConstructor"]

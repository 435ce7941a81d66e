"""What a config adds to training: hooks and optimizer constructors."""

from .hooks import OffsetStatsHook, OffsetWarmupHook
from .optimizers import OffsetLrConstructor

__all__ = ["OffsetLrConstructor", "OffsetStatsHook", "OffsetWarmupHook"]

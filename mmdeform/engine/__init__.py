"""What a config adds to training: hooks and optimizer constructors."""

from .hooks import OffsetStatsHook, OffsetWarmupHook, SamplingVisHook
from .optimizers import LayerDecayConstructor, OffsetLrConstructor

__all__ = [
    "LayerDecayConstructor",
    "OffsetLrConstructor",
    "OffsetStatsHook",
    "OffsetWarmupHook",
    "SamplingVisHook",
]

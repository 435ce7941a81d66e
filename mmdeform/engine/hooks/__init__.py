"""Hooks for training."""

from .offset_stats_hook import OffsetStatsHook
from .offset_warmup_hook import OffsetWarmupHook

__all__ = ["OffsetStatsHook", "OffsetWarmupHook"]

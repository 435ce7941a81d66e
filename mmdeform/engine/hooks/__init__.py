"""Hooks for training."""

from .offset_stats_hook import OffsetStatsHook
from .offset_warmup_hook import OffsetWarmupHook
from .sampling_vis_hook import SamplingVisHook

__all__ = ["OffsetStatsHook", "OffsetWarmupHook", "SamplingVisHook"]

"""Numbers about the offsets and masks of one layer, summed over its calls."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmdeform.layers.sampling import Sampling

__all__ = ["OffsetStatistics"]

# Percentiles of more samples than this are estimated from as many samples drawn at random: the
# share of samples below the estimate is right to about 0.001. torch.quantile takes 16 M at most.
MAX_SAMPLES = 2**20
SATURATED = (0.05, 0.95)


class OffsetStatistics:
    """Collects the calls of a layer, and computes its statistics when asked.

    Nothing waits for the device before that. Random numbers come from a generator of its own.
    """

    def __init__(self) -> None:
        self._lengths: list[Tensor] = []
        self._counts: list[int] = []
        self._sums: dict[str, list[Tensor]] = {}
        self._outputs = 0  # sums over all samples, or over all outputs for the entropy

    def add(self, sampling: Sampling) -> None:
        """Adds one call of the layer; one without samples, as of RoIs, changes nothing."""
        length = torch.hypot(sampling.offset[..., 0], sampling.offset[..., 1]).flatten()
        if length.numel() == 0:
            return
        self._counts.append(length.numel())
        self._sum("max", length.amax())
        self._lengths.append(_thin(length, MAX_SAMPLES))
        self._sum("outside", sampling.outside.sum())
        mask = sampling.mask
        if mask is None:
            return
        if sampling.weighting == "softmax":
            samples = math.prod(mask.shape[dim] for dim in sampling.sample_dims)
            if samples > 1:  # there is nothing to choose from one
                entropy = torch.special.entr(mask).sum() / math.log(samples)
                self._outputs += mask.numel() // samples
                self._sum("entropy", entropy)
            return
        self._sum("mask_mean", mask.sum())
        if sampling.weighting == "sigmoid":
            low, high = SATURATED
            self._sum("mask_saturated", ((mask < low) | (mask > high)).sum())

    def _sum(self, name: str, value: Tensor) -> None:
        self._sums.setdefault(name, []).append(value)

    def compute(self, percentiles: Sequence[float]) -> dict[str, float]:
        """The statistics by name; empty if there was no call with samples.

        Args:
            percentiles: Each in [0, 100].

        Returns:
            ``p<percentile>`` and ``max`` of the lengths of the offsets; shares in [0, 1]:
            ``outside`` of samples, ``mask_saturated`` of masks below 0.05 or above 0.95; means:
            ``mask_mean``, and ``entropy`` of softmaxed weights, divided by that of equal weights.
        """
        if not self._counts:
            return {}
        total = sum(self._counts)
        # Each call is represented in proportion to its samples.
        share = min(1.0, MAX_SAMPLES / total)
        parts = [
            _thin(length, math.ceil(count * share))
            for length, count in zip(self._lengths, self._counts, strict=True)
        ]
        lengths = torch.cat(parts)
        levels = lengths.new_tensor([percentile / 100 for percentile in percentiles])
        values: dict[str, Any] = {
            f"p{percentile:g}": value
            for percentile, value in zip(percentiles, torch.quantile(lengths, levels), strict=True)
        }
        for name, terms in self._sums.items():
            if name == "max":
                values[name] = torch.stack(terms).amax()
            else:
                count = self._outputs if name == "entropy" else total
                values[name] = torch.stack(terms).double().sum() / count
        return {name: float(value) for name, value in values.items()}


def _thin(values: Tensor, count: int) -> Tensor:
    """At most ``count`` of the values, drawn at random."""
    if values.numel() <= count:
        return values
    generator = torch.Generator(values.device).manual_seed(0)
    index = torch.randint(values.numel(), (count,), generator=generator, device=values.device)
    return values[index]

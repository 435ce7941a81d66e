"""How long a forward pass takes, and how much memory it needs."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..benchmark.measure import extra_bytes, interleave, make_clock
from .run import evaluation

__all__ = ["Latency", "latency", "peak_bytes", "weight_bytes"]


@dataclass(frozen=True)
class Latency:
    """Times of one forward pass, milliseconds.

    Attributes:
        times_ms: One for each run after the warm-up.
    """

    times_ms: list[float]

    @property
    def quartiles_ms(self) -> tuple[float, float, float]:
        """First quartile, median and third quartile."""
        if len(self.times_ms) == 1:
            return (self.times_ms[0],) * 3
        first, median, third = statistics.quantiles(self.times_ms, n=4, method="inclusive")
        return first, median, third


def latency(
    model: nn.Module,
    *args: Any,
    repeats: int = 10,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Latency:
    """Times forward passes in evaluation mode without gradients, after a warm-up.

    On a GPU CUDA events measure the device, on the CPU it is wall time.

    Args:
        model: Any model.
        args: What to call it with.
        repeats: Number of times.
        device: Of the model.
        kwargs: What to call it with.

    Raises:
        ValueError: ``repeats`` is less than one.
    """
    if repeats < 1:
        raise ValueError(f"repeats: expected at least one, got {repeats}")
    with evaluation(model):
        samples = interleave(
            {"forward": _forward(model, args, kwargs)}, repeats, make_clock(torch.device(device))
        )
    return Latency([1e3 * seconds for seconds, _ in samples["forward"]])


def peak_bytes(
    model: nn.Module, *args: Any, device: torch.device | str = "cpu", **kwargs: Any
) -> int | None:
    """Most memory that a forward pass without gradients has in use beyond weights and inputs.

    Its results count. On a GPU it is what torch allocates, on the CPU resident memory of the
    process, so that what libraries need counts, too.

    Args:
        model: Any model, whose forward pass has run before: what it keeps for ever is in place.
        args: What to call it with.
        device: Of the model.
        kwargs: What to call it with.

    Returns:
        Bytes; None on a CPU whose operating system does not tell.
    """
    forward = _forward(model, args, kwargs)

    def call() -> list[torch.Tensor]:
        forward()
        return []  # results count

    with evaluation(model):
        return extra_bytes(call, torch.device(device))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; what several names share counts once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _forward(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Callable[[], Any]:
    return lambda: model(*args, **kwargs)

"""Time and memory of a call.

Memory on the CPU is the high-water mark of resident memory, kept by the operating system. It sees
what the profiler's count of torch's allocator misses: worker threads, MKL and oneDNN, and plain
`malloc`. Free pages are given back before each measurement, so that their next use counts again.
Where both see everything they agree to about 0.2 MB.
"""

import ctypes
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Clock", "CpuClock", "CudaClock", "Timing", "extra_bytes", "interleave", "make_clock"]

Call = Callable[[], Any]

MIN_SAMPLE = 0.005  # seconds: shorter calls are repeated within a sample
_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one implementation took in one direction.

    Attributes:
        times_ms: One entry per repeat, milliseconds per call.
        host_ms: CUDA only: median time until the call returned, milliseconds.
        extra_bytes: Peak memory above inputs and results; None where it cannot be measured.
    """

    times_ms: list[float]
    host_ms: float | None
    extra_bytes: int | None

    @property
    def median_ms(self) -> float:
        return statistics.median(self.times_ms)

    @property
    def min_ms(self) -> float:
        return min(self.times_ms)


class CpuClock:
    """Wall time; short calls are repeated until a sample lasts :data:`MIN_SAMPLE`."""

    def __init__(self) -> None:
        self._calls: dict[str, int] = {}

    def prepare(self, name: str, call: Call) -> None:
        """Chooses how often ``call`` runs in a sample, from a run after a first one."""
        call()
        start = time.perf_counter()
        call()
        elapsed = time.perf_counter() - start
        self._calls[name] = max(1, min(1000, round(MIN_SAMPLE / max(elapsed, 1e-7))))

    def sample(self, name: str, call: Call) -> tuple[float, float | None]:
        """Seconds per call on the device, and seconds until the call returned (None: the same)."""
        count = self._calls[name]
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count, None


class CudaClock:
    """CUDA events around a call that finds a cold L2 cache and a GPU that is already busy.

    Each sample first times the host alone. Then twice the size of L2 is overwritten and the GPU
    sleeps for longer than the host needs to issue the call: events measure the GPU, not Python.
    """

    CYCLES_PER_SECOND = 2e9  # at most; a longer sleep does no harm
    WARM_UP = 3

    def __init__(self, device: torch.device):
        self._device = device
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)

    def prepare(self, name: str, call: Call) -> None:
        """Warms up."""
        for _ in range(self.WARM_UP):
            call()

    def sample(self, name: str, call: Call) -> tuple[float, float | None]:
        """Seconds on the GPU, and seconds until the call returned on an idle GPU."""
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        call()
        host = time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(int(1.5 * host * self.CYCLES_PER_SECOND))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(self._device)
        return begin.elapsed_time(end) / 1e3, host


Clock = CpuClock | CudaClock


def make_clock(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def interleave(calls: dict[str, Call], repeats: int, clock: Clock) -> dict[str, Any]:
    """Samples all calls in turn, A B C A B C, so that a busy moment hits all of them.

    Args:
        calls: By name.
        repeats: Samples per call, after warm-up.
        clock: Of the device.

    Returns:
        By name: (seconds on the device, seconds until the call returned or None), one per repeat.
    """
    for name, call in calls.items():
        clock.prepare(name, call)
    samples: dict[str, Any] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            samples[name].append(clock.sample(name, call))
    return samples


def extra_bytes(call: Callable[[], Iterable[Tensor]], device: torch.device) -> int | None:
    """Peak memory of a call above its inputs and the results that it returns.

    Args:
        call: Has run before, so that what it keeps for ever is in place.
        device: Where it runs.

    Returns:
        Bytes; None on a CPU whose operating system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        results = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        if not _reset_high_water():
            return None
        before = _status_bytes("VmRSS")
        results = call()
        peak = _status_bytes("VmHWM") - before
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in results}
    return max(0, peak - sum(storages.values()))


def _reset_high_water() -> bool:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:  # without it freed memory stays resident and would not count again
        return False
    trim(0)
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"{_STATUS} has no {key}")

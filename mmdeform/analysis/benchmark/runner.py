"""Runs cases: check against fp64, then clock, then memory."""

import dataclasses
import gc
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .case import Absent, Case, Inputs, Operator, Peer, cast
from .check import (
    TF32_TOLERANCE,
    TOLERANCES,
    Error,
    call_with_gradients,
    compare,
    reference_results,
)
from .measure import Clock, Timing, extra_bytes, interleave, make_clock

__all__ = ["OURS", "CaseResult", "Row", "Settings", "run_case", "select"]

OURS = "mmdeform"
MODES = ("forward", "forward_backward")
# Peers come from elsewhere: an error above the tolerance is shown, not hidden, but beyond this norm
# a peer computes something else, and its time would mean nothing.
PEER_NORM = 0.5


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: Where.
        dtype: Of the data.
        repeats: Samples per implementation and mode.
        peers: Names of the peers to measure; None: all.
        seed: Of the random inputs.
    """

    device: torch.device
    dtype: torch.dtype
    repeats: int = 7
    peers: Sequence[str] | None = None
    seed: int = 0


@dataclasses.dataclass
class Row:
    """What one implementation did.

    Attributes:
        name: ``mmdeform`` or that of the peer.
        kind: ``kernel`` or ``reference`` (mmdeform with and without a kernel for the device),
            ``peer``, or ``yardstick``, which computes something else.
        dtype: Of the data it was given; differs from the case's where it does not support that.
        error: By result, ``None`` for a yardstick.
        exact: All errors are within the tolerance.
        forward: Without gradients.
        forward_backward: With the gradients of all floating-point inputs but constants.
    """

    name: str
    kind: str
    dtype: str
    error: dict[str, Error] | None
    exact: bool
    forward: Timing | None = None
    forward_backward: Timing | None = None


@dataclasses.dataclass
class CaseResult:
    """What a case gave.

    Attributes:
        operator: Name of the operator.
        case: Name of the case.
        device: Device type.
        dtype: Of the data.
        batch: Batch size.
        shapes: Of tensors and values of other inputs.
        tolerance: Largest accepted ``Error.worst``.
        refused: Why no speed is reported, or None.
        rows: mmdeform first; empty if refused.
        absent: Reasons by name of the peers that were not measured.
    """

    operator: str
    case: str
    device: str
    dtype: str
    batch: int
    shapes: dict[str, Any]
    tolerance: float
    refused: str | None = None
    rows: list[Row] = dataclasses.field(default_factory=list)
    absent: dict[str, str] = dataclasses.field(default_factory=dict)

    def relative(self, row: Row, mode: str) -> float | None:
        """Median time of a row over that of mmdeform; above 1: mmdeform is faster."""
        ours, other = getattr(self.rows[0], mode), getattr(row, mode)
        return None if ours is None or other is None else other.median_ms / ours.median_ms

    def to_json(self) -> dict[str, Any]:
        """Plain types; timings with median, minimum and the time relative to mmdeform."""
        result = dataclasses.asdict(self)
        for row, plain in zip(self.rows, result["rows"], strict=True):
            for mode in MODES:
                timing = getattr(row, mode)
                if timing is not None:
                    plain[mode] |= {
                        "median_ms": timing.median_ms,
                        "min_ms": timing.min_ms,
                        "relative": self.relative(row, mode),
                    }
        return result


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def select(
    operators: Sequence[Operator],
    device_type: str,
    filters: Sequence[str] = (),
    batches: Sequence[int] = (),
    sweep: bool = False,
) -> Iterator[tuple[Operator, Case, int]]:
    """The cases to run.

    Args:
        operators: In order.
        device_type: ``cpu`` or ``cuda``.
        filters: Keeps cases whose name contains one of these; looks at all cases.
        batches: Replaces the batch sizes of the cases.
        sweep: Takes all cases, not only the default ones of the device.
    """
    for operator in operators:
        for case in operator.cases:
            if filters and not any(part in case.name for part in filters):
                continue
            if device_type in case.batches or sweep or filters:
                for batch in batches or case.batches.get(device_type, (1,)):
                    yield operator, case, batch


def run_case(operator: Operator, case: Case, batch: int, settings: Settings) -> CaseResult:
    """Checks and measures one case.

    Args:
        operator: What to measure.
        case: At which shape.
        batch: Batch size.
        settings: How.

    Returns:
        Timings, or the reason of a refusal: mmdeform's output or a gradient differs from the
        reference in fp64 by more than the tolerance, or the call fails.
    """
    device, dtype = settings.device, settings.dtype
    generator = torch.Generator().manual_seed(settings.seed)
    # Rounded once, so that implementations in any dtype see the same values.
    data = cast(case.make(batch, generator), device, dtype, _wide(operator.constants, dtype))
    inputs = _own_inputs(operator, data, settings)
    result = CaseResult(
        operator=operator.name,
        case=case.name,
        device=device.type,
        dtype=dtype_name(dtype),
        batch=batch,
        shapes={
            name: list(value.shape) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        },
        tolerance=_tolerance(dtype, device),
    )
    kind = "kernel" if operator.has_kernel(device.type) else "reference"
    try:
        output = operator.function(**inputs)
        grad_output = torch.randn(output.shape, generator=generator).to(device, dtype)
        results = call_with_gradients(operator.function, inputs, grad_output, operator.constants)
    except Exception as error:
        result.refused = f"the call fails: {error}"
        return result
    try:
        expected = reference_results(operator, inputs, grad_output)
        errors = compare(results, expected)
    except ValueError as error:
        result.refused = str(error)
        return result
    del output, results
    wrong = {name: e.worst for name, e in errors.items() if not e.worst <= result.tolerance}
    if wrong:
        result.refused = "differs from the reference in fp64: " + ", ".join(
            f"{name} by {worst:.1e}" for name, worst in wrong.items()
        )
        return result
    result.rows.append(Row(OURS, kind, dtype_name(dtype), errors, exact=True))
    calls = {OURS: _Calls(operator.function, inputs, grad_output, operator.constants)}
    for peer in operator.peers:
        if settings.peers is None or peer.name in settings.peers:
            try:
                row, call = _admit(peer, operator, data, grad_output, expected, settings)
            except Absent as error:
                result.absent[peer.name] = str(error)
            else:
                result.rows.append(row)
                calls[peer.name] = call
    del expected
    _measure(result.rows, calls, settings, make_clock(device))
    return result


@dataclasses.dataclass(frozen=True)
class _Calls:
    """One implementation with its inputs."""

    function: Callable[..., Tensor]
    inputs: Inputs
    grad_output: Tensor
    constants: tuple[str, ...]

    def forward(self) -> list[Tensor]:
        with torch.no_grad():
            return [self.function(**self.inputs)]

    def forward_backward(self) -> list[Tensor]:
        return list(self.results().values())

    def results(self) -> dict[str, Tensor]:
        return call_with_gradients(self.function, self.inputs, self.grad_output, self.constants)


def _own_inputs(operator: Operator, data: Inputs, settings: Settings) -> Inputs:
    # As under autocast.
    wide = _wide(operator.coordinates + operator.constants, settings.dtype)
    return cast(data, settings.device, settings.dtype, wide)


def _wide(names: tuple[str, ...], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """For inputs that are not to be narrower than fp32."""
    return dict.fromkeys(names, torch.float64 if dtype == torch.float64 else torch.float32)


def _tolerance(dtype: torch.dtype, device: torch.device) -> float:
    tf32 = dtype == torch.float32 and device.type == "cuda"
    return TF32_TOLERANCE if tf32 and torch.backends.cuda.matmul.allow_tf32 else TOLERANCES[dtype]


def _admit(
    peer: Peer,
    operator: Operator,
    data: Inputs,
    grad_output: Tensor,
    expected: dict[str, Tensor],
    settings: Settings,
) -> tuple[Row, _Calls]:
    """Loads a peer and compares it with the reference; raises Absent if it cannot be measured."""
    function = peer.load(settings.device.type)
    need = peer.copies * operator.samples(data) * settings.dtype.itemsize
    if need > 0.7 * _free_bytes(settings.device):
        raise Absent(f"would need about {need / 2**30:.0f} GiB of memory")
    # A peer without bf16 runs in fp16, which is what its users have.
    dtypes = [settings.dtype] + [torch.float16] * (settings.dtype == torch.bfloat16)
    reasons = []
    for dtype in dtypes:
        variant = dataclasses.replace(settings, dtype=dtype)
        if peer.coordinates_as_data:
            inputs = cast(data, settings.device, dtype, _wide(operator.constants, dtype))
        else:
            inputs = _own_inputs(operator, data, variant)
        calls = _Calls(function, inputs, grad_output.to(dtype), operator.constants)
        try:
            results = calls.results()
        except Exception as error:
            reasons.append(f"{dtype_name(dtype)} fails: {str(error).strip().splitlines()[0]}")
            continue
        if not peer.same_function:
            return Row(peer.name, "yardstick", dtype_name(dtype), None, exact=True), calls
        errors = compare(results, expected)
        for name, error in errors.items():
            if not error.norm <= PEER_NORM:
                how = f"by {error.norm:.0%}" if math.isfinite(error.norm) else "and is not finite"
                raise Absent(f"wrong in {dtype_name(dtype)}: {name} differs from fp64 {how}")
        within = all(error.worst <= _tolerance(dtype, settings.device) for error in errors.values())
        return Row(peer.name, "peer", dtype_name(dtype), errors, exact=within), calls
    raise Absent("; ".join(reasons))


def _measure(rows: list[Row], calls: dict[str, _Calls], settings: Settings, clock: Clock) -> None:
    gc.collect()
    for mode in MODES:
        functions = {name: getattr(call, mode) for name, call in calls.items()}
        samples = interleave(functions, settings.repeats, clock)
        for row in rows:
            times, hosts = zip(*samples[row.name], strict=True)
            known = sorted(host for host in hosts if host is not None)
            timing = Timing(
                times_ms=[1e3 * seconds for seconds in times],
                host_ms=1e3 * known[len(known) // 2] if known else None,
                extra_bytes=extra_bytes(functions[row.name], settings.device),
            )
            setattr(row, mode, timing)


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not on this system: try it
        return math.inf

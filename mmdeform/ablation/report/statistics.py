"""Means and spreads over the seeds of each row, and paired differences to the base row."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..results import STATUSES, RowResult

__all__ = ["COSTS", "RowSummary", "Statistic", "Summary", "describe", "summarize"]

COSTS = ("parameters", "macs", "latency_ms", "peak_memory_bytes")


@dataclass(frozen=True)
class Statistic:
    """Of the finite ones of some values.

    Attributes:
        mean (float, optional): None without a finite value.
        std (float, optional): Sample standard deviation (divided by n - 1); None for n < 2.
        n (int): Number of finite values.
        not_finite (int): Number of values that are NaN or infinite and therefore left out.
    """

    mean: float | None
    std: float | None
    n: int
    not_finite: int = 0


@dataclass(frozen=True)
class RowSummary:
    """All seeds of one row.

    Attributes:
        row (str): Its name.
        labels (dict[str, str]): Axis and name of the row's value on it.
        is_base (bool): Whether the others are compared with it.
        runs (tuple[RowResult, ...]): In the order of their seeds, whatever their status.
        metrics (dict[str, Statistic]): Over the finished runs.
        differences (dict[str, Statistic]): Of a finished run's metric minus the one of the base
            row's finished run with the same seed, over those seeds. Empty for the base row itself
            and where there is none.
        costs (dict[str, Statistic]): Of each of ``COSTS``, over all runs that know it.
    """

    row: str
    labels: dict[str, str]
    is_base: bool
    runs: tuple[RowResult, ...]
    metrics: dict[str, Statistic]
    differences: dict[str, Statistic]
    costs: dict[str, Statistic]

    @property
    def finished(self) -> int:
        """Number of finished runs."""
        return len(_finished(self.runs))


@dataclass(frozen=True)
class Summary:
    """What the tables show.

    Attributes:
        rows (tuple[RowSummary, ...]): In the order of the results.
        axes (tuple[str, ...]): Names of all axes.
        metrics (tuple[str, ...]): Names of the metrics shown.
        base (str, optional): Name of the base row.
    """

    rows: tuple[RowSummary, ...]
    axes: tuple[str, ...]
    metrics: tuple[str, ...]
    base: str | None

    @property
    def unfinished(self) -> list[RowResult]:
        """All runs that are not finished."""
        return [run for row in self.rows for run in row.runs if run.status != "finished"]


def describe(values: Iterable[float]) -> Statistic:
    """Mean and sample standard deviation of the finite values."""
    values = list(values)
    finite = [value for value in values if math.isfinite(value)]
    return Statistic(
        mean=statistics.fmean(finite) if finite else None,
        std=statistics.stdev(finite) if len(finite) > 1 else None,
        n=len(finite),
        not_finite=len(values) - len(finite),
    )


def summarize(results: Sequence[RowResult], metrics: Sequence[str] | None = None) -> Summary:
    """Collects runs into rows.

    Args:
        results: All runs, in the order wanted of their rows.
        metrics: Names of those to show, default: all of the finished runs.

    Raises:
        ValueError: If there is no result, a run comes twice, runs of one row contradict each other,
            several rows are the base, a status is unknown, or no finished run has a metric.
    """
    if not results:
        raise ValueError("results: expected at least one run, got none")
    known = list(dict.fromkeys(name for run in _finished(results) for name in run.metrics))
    for name in metrics or ():
        if known and name not in known:
            raise ValueError(f"metrics: no finished run has {name!r}; known: {', '.join(known)}")
    shown = tuple(dict.fromkeys(known if metrics is None else metrics))

    rows: dict[str, list[RowResult]] = {}
    for run in results:
        rows.setdefault(run.row, []).append(run)
    for runs in rows.values():
        _check(runs)
    bases = [name for name, runs in rows.items() if runs[0].is_base]
    if len(bases) > 1:
        raise ValueError(f"results: expected one base row, got {', '.join(bases)}")
    base = rows[bases[0]] if bases else []
    return Summary(
        rows=tuple(_summarize_row(runs, base, shown) for runs in rows.values()),
        axes=tuple(dict.fromkeys(axis for run in results for axis in run.labels)),
        metrics=shown,
        base=bases[0] if bases else None,
    )


def _check(runs: Sequence[RowResult]) -> None:
    first = runs[0]
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"results: row {first.row!r}: a seed comes twice, got {seeds}")
    for run in runs:
        if run.status not in STATUSES:
            raise ValueError(
                f"results: row {run.row!r}: expected a status of {', '.join(STATUSES)}, "
                f"got {run.status!r}"
            )
        if (run.labels, run.is_base) != (first.labels, first.is_base):
            raise ValueError(
                f"results: row {run.row!r}: expected equal labels and is_base for all seeds, got "
                f"{first.labels}, {first.is_base} and {run.labels}, {run.is_base}"
            )


def _finished(runs: Iterable[RowResult]) -> list[RowResult]:
    return [run for run in runs if run.status == "finished"]


def _summarize_row(
    runs: Sequence[RowResult], base: Sequence[RowResult], metrics: Sequence[str]
) -> RowSummary:
    first = runs[0]
    values = {name: _by_seed(runs, name) for name in metrics}
    differences = {}
    if base and not first.is_base:
        for name in metrics:
            reference = _by_seed(base, name)
            pairs = values[name].keys() & reference.keys()
            differences[name] = describe(values[name][s] - reference[s] for s in sorted(pairs))
    return RowSummary(
        row=first.row,
        labels=first.labels,
        is_base=first.is_base,
        runs=tuple(sorted(runs, key=lambda run: run.seed)),
        metrics={name: describe(values[name].values()) for name in metrics},
        differences=differences,
        costs={
            name: describe(value for run in runs if (value := getattr(run, name)) is not None)
            for name in COSTS
        },
    )


def _by_seed(runs: Sequence[RowResult], metric: str) -> dict[int, float]:
    return {run.seed: run.metrics[metric] for run in _finished(runs) if metric in run.metrics}

"""The table of rows: for each cell what is read and what it sorts by."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .statistics import RowSummary, Statistic, Summary

__all__ = ["LEGEND", "NOTHING", "Cell", "Column", "columns"]

NOTHING = "-"
LEGEND = (
    "Mean ± sample standard deviation (n - 1) over the finished seeds; without ± one seed only.",
    "Δ is the difference to the base row: the mean of the differences between runs of equal seed, "
    "± their standard deviation.",
    "(n=...) stands where fewer values than finished seeds count; NaN and infinite ones never do.",
    "Costs of one image: multiply-adds (MACs), median latency, peak memory beyond the weights.",
)


@dataclass(frozen=True)
class Cell:
    """What is read, and the value that it sorts by: None for nothing, which comes last."""

    text: str
    value: float | str | None


@dataclass(frozen=True)
class Column:
    """A title, whether it sorts by numbers, and a cell for each row."""

    title: str
    numeric: bool
    cells: tuple[Cell, ...]


def columns(summary: Summary) -> list[Column]:
    """The table's columns, left to right."""
    rows = summary.rows
    found = [_names("row", [row.row for row in rows])]
    found += [
        _names(axis, [row.labels.get(axis, NOTHING) for row in rows]) for axis in summary.axes
    ]
    found.append(
        Column(
            "finished seeds",
            True,
            tuple(Cell(f"{row.finished}/{len(row.runs)}", row.finished) for row in rows),
        )
    )
    for name in summary.metrics:
        digits = _decimals([row.metrics[name] for row in rows])
        found.append(_metric(name, rows, digits))
        if summary.base is not None:
            found.append(_difference(name, rows, digits))
    for title, cost, unit in (
        ("parameters (M)", "parameters", 1e6),
        ("MACs (G)", "macs", 1e9),
        ("latency (ms)", "latency_ms", 1.0),
        ("peak memory (MiB)", "peak_memory_bytes", 2.0**20),
    ):
        scaled = [_scaled(row.costs[cost], unit) for row in rows]
        digits = _decimals(scaled)
        found.append(Column(title, True, tuple(_cell(cost, digits) for cost in scaled)))
    return found


def _names(title: str, names: Sequence[str]) -> Column:
    return Column(title, False, tuple(Cell(name, name) for name in names))


def _metric(name: str, rows: Sequence[RowSummary], digits: int) -> Column:
    cells = tuple(_cell(row.metrics[name], digits, expected=row.finished) for row in rows)
    return Column(name, True, cells)


def _difference(name: str, rows: Sequence[RowSummary], digits: int) -> Column:
    cells = tuple(
        Cell("base", 0.0)
        if row.is_base
        else _cell(row.differences[name], digits, expected=row.finished, sign="+")
        for row in rows
    )
    return Column(f"Δ {name}", True, cells)


def _cell(statistic: Statistic, digits: int, expected: int | None = None, sign: str = "") -> Cell:
    notes = []
    if expected is not None and statistic.n < expected:
        notes.append(f"n={statistic.n}")
    if statistic.not_finite:
        notes.append(f"{statistic.not_finite} not finite")
    text = NOTHING
    if statistic.mean is not None:
        text = f"{statistic.mean:{sign}.{digits}f}"
        if statistic.std is not None and (expected is not None or statistic.std > 0):
            text += f" ± {statistic.std:.{digits}f}"
    return Cell(f"{text} ({', '.join(notes)})" if notes else text, statistic.mean)


def _decimals(statistics: Sequence[Statistic]) -> int:
    """Decimals that show four digits of the column's largest mean."""
    largest = max((abs(s.mean) for s in statistics if s.mean is not None), default=0.0)
    if largest == 0:
        return 4
    return min(max(3 - math.floor(math.log10(largest)), 0), 8)


def _scaled(statistic: Statistic, unit: float) -> Statistic:
    mean, std = (None if x is None else x / unit for x in (statistic.mean, statistic.std))
    return Statistic(mean, std, statistic.n, statistic.not_finite)

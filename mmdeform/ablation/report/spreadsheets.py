"""The report as CSV: the rows, the single runs, and all points of the learning curves."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .statistics import COSTS, Statistic, Summary

__all__ = ["write_curves", "write_runs", "write_summary"]


def write_summary(summary: Summary, path: Path) -> None:
    """One line per row: mean, std, n and not_finite of everything; empty where unknown."""
    head = ["row", *(f"axis/{axis}" for axis in summary.axes), "is_base", "runs", "finished"]
    names = [
        *(f"{kind}/{name}" for name in summary.metrics for kind in ("metric", "difference")),
        *COSTS,
    ]
    head += [f"{name}/{part}" for name in names for part in ("mean", "std", "n", "not_finite")]
    lines = []
    for row in summary.rows:
        line = [row.row, *(row.labels.get(axis) for axis in summary.axes)]
        line += [row.is_base, len(row.runs), row.finished]
        for name in summary.metrics:
            line += _statistic(row.metrics[name]) + _statistic(row.differences.get(name))
        for name in COSTS:
            line += _statistic(row.costs[name])
        lines.append(line)
    _write(path, head, lines)


def write_runs(summary: Summary, path: Path) -> None:
    """One line per row and seed, with every metric, whichever the tables show."""
    runs = [run for row in summary.rows for run in row.runs]
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics))
    head = ["row", *(f"axis/{axis}" for axis in summary.axes), "is_base", "seed", "status"]
    head += [*(f"metric/{name}" for name in metrics), *COSTS, "error"]
    lines = (
        [
            run.row,
            *(run.labels.get(axis) for axis in summary.axes),
            run.is_base,
            run.seed,
            run.status,
            *(run.metrics.get(name) for name in metrics),
            *(getattr(run, name) for name in COSTS),
            run.error,
        ]
        for run in runs
    )
    _write(path, head, lines)


def write_curves(summary: Summary, path: Path) -> None:
    """One line per row, seed, curve and epoch."""
    lines = (
        [row.row, run.seed, name, epoch, value]
        for row in summary.rows
        for run in row.runs
        for name, points in run.curves.items()
        for epoch, value in points
    )
    _write(path, ["row", "seed", "curve", "epoch", "value"], lines)


def _statistic(statistic: Statistic | None) -> list[Any]:
    if statistic is None:
        return [None] * 4
    return [statistic.mean, statistic.std, statistic.n, statistic.not_finite]


def _write(path: Path, head: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        writer.writerows(lines)

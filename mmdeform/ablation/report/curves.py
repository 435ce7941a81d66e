"""Learning curves of a row: mean and spread over its seeds at each epoch."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..results import RowResult
from .statistics import Statistic, Summary, describe

__all__ = ["CurvePoint", "curve_names", "mean_curve"]


@dataclass(frozen=True)
class CurvePoint:
    """An epoch, and the statistic over the runs that reached it."""

    epoch: int
    over_seeds: Statistic


def curve_names(summary: Summary) -> list[str]:
    """Names of all curves: the metrics shown come first."""
    found = dict.fromkeys(name for row in summary.rows for run in row.runs for name in run.curves)
    shown = [name for name in summary.metrics if name in found]
    return list(dict.fromkeys([*shown, *found]))


def mean_curve(runs: Sequence[RowResult], name: str) -> list[CurvePoint]:
    """The mean curve of runs that differ in their seed, also of those that are not finished.

    Of several values for one epoch, which a resumed run may have, the last counts.
    """
    epochs: dict[int, list[float]] = {}
    for run in runs:
        for epoch, value in dict(run.curves.get(name, ())).items():
            epochs.setdefault(epoch, []).append(value)
    return [CurvePoint(epoch, describe(values)) for epoch, values in sorted(epochs.items())]

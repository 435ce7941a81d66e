"""Writes all files of a report."""

from collections.abc import Sequence
from pathlib import Path

from ..results import RowResult
from .figure import curves_figure
from .markdown import to_markdown
from .page import to_html
from .spreadsheets import write_curves, write_runs, write_summary
from .statistics import summarize

__all__ = ["write_report"]


def write_report(
    results: Sequence[RowResult],
    out: Path,
    *,
    title: str,
    metrics: Sequence[str] | None = None,
) -> list[Path]:
    """Writes ``report.md``, ``report.html``, ``curves.png`` and three CSV files.

    Metrics are averaged over the finished runs. Those that are not finished are counted and listed
    with their error. The page holds all that it shows and needs no network.

    Args:
        results: All runs, in the order wanted of their rows.
        out: Folder, made if need be. Files of an earlier report are replaced.
        title: The report's headline.
        metrics: Names of those that the tables show, in their order, default: all of the finished
            runs. ``runs.csv`` and ``curves.csv`` hold all in any case.

    Returns:
        The paths of the files.

    Raises:
        ValueError: If there is no result, a run comes twice, runs of one row contradict each other,
            several rows are the base, a status is unknown, or no finished run has a metric.
    """
    summary = summarize(results, metrics)
    out.mkdir(parents=True, exist_ok=True)
    picture, figure = out / "curves.png", curves_figure(summary)
    if figure is None:
        picture.unlink(missing_ok=True)
    else:
        figure.savefig(picture)
    markdown = to_markdown(summary, title, picture.name if figure else None)
    (out / "report.md").write_text(markdown, encoding="utf-8")
    (out / "report.html").write_text(to_html(summary, title), encoding="utf-8")
    write_summary(summary, out / "summary.csv")
    write_runs(summary, out / "runs.csv")
    write_curves(summary, out / "curves.csv")
    names = ["report.md", "report.html", "summary.csv", "runs.csv", "curves.csv"]
    return [out / name for name in names] + ([picture] if figure else [])

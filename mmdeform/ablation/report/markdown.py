"""The report as GitHub-flavoured Markdown."""

import re

from ..results import RowResult
from .statistics import Summary
from .table import LEGEND, columns

__all__ = ["to_markdown"]

# Underscores inside words are safe, and common in names.
SPECIAL = re.compile(r"[\\`*\[\]|<>&~#$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def to_markdown(summary: Summary, title: str, curves: str | None = None) -> str:
    """The table, what it means, a picture of the curves, and the runs that are not finished."""
    table = columns(summary)
    rows = zip(*(column.cells for column in table), strict=True)
    lines = [
        [escape(column.title) for column in table],
        ["---:" if column.numeric else "---" for column in table],
        *([escape(cell.text) for cell in row] for row in rows),
    ]
    base = "There is no base row." if summary.base is None else f"Base row: {escape(summary.base)}."
    parts = [
        f"# {escape(title)}",
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
        "\n".join(f"- {line}" for line in (base, *LEGEND)),
    ]
    if curves is not None:
        parts.append(f"![learning curves]({curves})")
    if summary.unfinished:
        parts.append("## Runs that are not finished")
        parts += [_run(run) for run in summary.unfinished]
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return SPECIAL.sub(lambda match: f"\\{match[0]}", " ".join(text.split()))


def _run(run: RowResult) -> str:
    line = f"- {escape(run.row)}, seed {run.seed}: {run.status}"
    if not run.error:
        return line
    longest = max((len(ticks) for ticks in re.findall("`+", run.error)), default=0)
    fence = "`" * max(3, longest + 1)
    block = "\n".join(f"  {text}" for text in [fence, *run.error.splitlines(), fence])
    return f"{line}\n\n{block}"

"""The report as one HTML page: a sortable table and learning curves, without a network."""

import html
import json
import re
from importlib import resources
from typing import Any

from plotly.offline import get_plotlyjs

from .curves import curve_names, mean_curve
from .statistics import Summary
from .table import LEGEND, Column, columns

__all__ = ["to_html"]


def to_html(summary: Summary, title: str) -> str:
    """The whole page, plotly.js (about 5 MB) included.

    Its content security policy forbids the browser every request. ``#sort=COLUMN`` after its
    address sorts the table by that title, ``#sort=-COLUMN`` in descending order.
    """
    files = resources.files(__package__)
    parts = {
        "title": html.escape(title),
        "base": "There is no base row."
        if summary.base is None
        else f"Base row: <b>{html.escape(summary.base)}</b>.",
        "legend": "\n".join(f"<li>{html.escape(line)}</li>" for line in LEGEND),
        "table": _table(summary, columns(summary)),
        "unfinished": _unfinished(summary),
        "curves": _json(_curves(summary)),
        "style": files.joinpath("page.css").read_text("utf-8"),
        "script": files.joinpath("page.js").read_text("utf-8"),
        "plotly": get_plotlyjs(),
    }
    template = files.joinpath("page.html").read_text("utf-8")
    # One pass: a title that looks like a placeholder stays a title.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _table(summary: Summary, table: list[Column]) -> str:
    head = "".join(
        f'<th scope="col" class="{_kind(column)}" data-key="{html.escape(column.title)}">'
        f'<button type="button">{html.escape(column.title).replace("Δ ", "Δ&nbsp;")}</button></th>'
        for column in table
    )
    body = []
    for index, row in enumerate(summary.rows):
        kind = "base" if row.is_base else "" if row.finished else "unfinished"
        cells = "".join(_cell(column, index) for column in table)
        body.append(f'<tr class="{kind}" data-row="{html.escape(row.row)}">{cells}</tr>')
    return f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody>"


def _cell(column: Column, index: int) -> str:
    cell = column.cells[index]
    value = "" if cell.value is None else html.escape(str(cell.value))
    tag = 'th scope="row"' if column.title == "row" else "td"
    return (
        f'<{tag} class="{_kind(column)}" data-value="{value}">'
        f"{html.escape(cell.text)}</{tag.split()[0]}>"
    )


def _kind(column: Column) -> str:
    return "number" if column.numeric else "text"


def _unfinished(summary: Summary) -> str:
    if not summary.unfinished:
        return ""
    items = []
    for run in summary.unfinished:
        error = f"<pre>{html.escape(run.error)}</pre>" if run.error else ""
        items.append(
            f"<li><b>{html.escape(run.row)}</b>, seed {run.seed}: {run.status}{error}</li>"
        )
    return (
        '<section id="unfinished"><h2>Runs that are not finished</h2>\n'
        f"<ul>{''.join(items)}</ul></section>"
    )


def _curves(summary: Summary) -> list[dict[str, Any]]:
    found = []
    for name in curve_names(summary):
        rows = []
        for row in summary.rows:
            points = mean_curve(row.runs, name)
            if points:
                rows.append(
                    {
                        "row": row.row,
                        "epoch": [point.epoch for point in points],
                        "mean": [point.over_seeds.mean for point in points],
                        "std": [point.over_seeds.std for point in points],
                        "n": [point.over_seeds.n for point in points],
                    }
                )
        found.append({"name": name, "rows": rows})
    return found


def _json(value: Any) -> str:
    """JSON that no HTML parser takes for the end of its element."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")

"""Learning curves as a picture, for Markdown and papers."""

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .curves import curve_names, mean_curve
from .statistics import Summary

__all__ = ["curves_figure"]

COLORS = colormaps["tab10"].colors
LINES = ("-", "--", ":", "-.")
COLUMNS = 3


def curves_figure(summary: Summary) -> Figure | None:
    """One plot for each of the metrics shown, mean and standard deviation over the seeds.

    Returns:
        Figure, optional: None if there is no curve.
    """
    names = [name for name in curve_names(summary) if name in summary.metrics]
    if not names:
        return None
    columns = min(len(names), COLUMNS)
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4 * columns, 3 * lines + 0.2 * len(summary.rows)), dpi=110)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis, name in zip(axes, names, strict=False):
        _draw(axis, summary, name)
    for axis in list(axes)[len(names) :]:
        axis.set_axis_off()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _draw(axis: Axes, summary: Summary, name: str) -> None:
    for index, row in enumerate(summary.rows):
        style = dict(color=COLORS[index % len(COLORS)], label=row.row)
        style["linestyle"] = LINES[index // len(COLORS) % len(LINES)]
        points = [point for point in mean_curve(row.runs, name) if point.over_seeds.n]
        epochs = [point.epoch for point in points]
        means = [point.over_seeds.mean for point in points]
        axis.plot(epochs, means, marker="." if len(points) < 20 else "", **style)
        spreads = [point.over_seeds.std or 0.0 for point in points]
        bounds = [[mean + sign * std for mean, std in zip(means, spreads, strict=True)]
                  for sign in (-1, 1)]  # fmt: skip
        axis.fill_between(epochs, *bounds, color=style["color"], alpha=0.15, linewidth=0)
    axis.set_title(name, fontsize="medium")
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)

"""Effective dilation as a picture."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .objects import CLASSES
from .spread import LayerDilation, Spread

__all__ = ["draw_dilation", "labels_of"]

COLORS = dict(zip(CLASSES, ("#56B4E9", "#009E73", "#D55E00", "0.45"), strict=True))
MARKERS = dict(zip(CLASSES, "osD^", strict=True))
GROUP = 0.6  # width of the dots of a layer; layers are 1 apart


def labels_of(rows: Sequence[LayerDilation]) -> list[str]:
    """Names of layers without the parts with which all begin, and with the call if it needs one."""
    names = [row.layer.split(".") for row in rows]
    common = 0
    while len({tuple(name[: common + 1]) for name in names}) == 1 < len(names[0]) - common:
        common += 1
    several = {row.layer for row in rows if row.call}
    return [
        ".".join(name[common:]) + (f" [{row.call}]" if row.layer in several else "")
        for name, row in zip(names, rows, strict=True)
    ]


def draw_dilation(rows: Sequence[LayerDilation]) -> Figure:
    """Draws mean and standard deviation by layer and class of object.

    Args:
        rows: At least one layer; see :meth:`EffectiveDilation.rows`.

    Returns:
        The picture: pixels of the sampled maps above, of the original image below.
    """
    figure = Figure(figsize=(max(5.0, 1.6 + 0.62 * len(rows)), 6.4), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    for axis, unit in ((above, "sampled map"), (below, "original image")):
        _draw_spreads(axis, [row.classes if axis is above else row.in_image for row in rows])
        axis.set_ylabel(f"effective dilation,\npixels of the {unit}")
        axis.set_ylim(bottom=0)
        axis.grid(axis="y", color="0.9")
        axis.set_axisbelow(True)
    for index, row in enumerate(rows):
        label = "without offsets" if not index else None
        above.plot([index - 0.45, index + 0.45], [row.regular] * 2, "k:", lw=1.2, label=label)
    below.set_xticks(range(len(rows)), labels_of(rows), rotation=40, ha="right")
    below.set_xlim(-0.6, len(rows) - 0.4)
    handles, labels = above.get_legend_handles_labels()
    columns = 3 if len(rows) < 6 else len(labels)
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
    return figure


def _draw_spreads(axis: Axes, layers: Sequence[dict[str, Spread]]) -> None:
    for index, name in enumerate(CLASSES):
        seen = [(x, spreads[name]) for x, spreads in enumerate(layers) if spreads[name].count]
        shift = GROUP * (index / (len(CLASSES) - 1) - 0.5)
        axis.errorbar(
            [x + shift for x, _ in seen],
            [spread.mean for _, spread in seen],
            [spread.std for _, spread in seen],
            fmt=MARKERS[name],
            color=COLORS[name],
            markersize=4.5,
            elinewidth=1.2,
            capsize=2,
            label=name,
        )

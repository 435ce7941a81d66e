"""Curves of sparsity, drawn without a graphical backend."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .run import CheckpointSparsity
from .sparsity import LayerSparsity

__all__ = ["draw_sparsity"]

LABELS = {
    "negative_entropy": "negative entropy\n(0: one key)",
    "normalised_entropy": "entropy / log n\n(1: uniform, 0: one key)",
}
NAMED = 8  # lines that a legend names at most


def draw_sparsity(measured: Sequence[CheckpointSparsity]) -> Figure:
    """Draws how sparse attention is over the checkpoints of a run.

    A column for each place (encoder self, decoder cross, ...), with negative entropy above and
    normalised entropy below; a line for each layer, the later the brighter, and a thin one for each
    of its heads. The dotted line is uniform attention.

    Args:
        measured: Checkpoints in their order, all with the same layers.
    """
    places: dict[str, list[LayerSparsity]] = {}
    for layer in measured[-1].layers.values():
        places.setdefault(layer.place, []).append(layer)
    figure = Figure((1.0 + 3.4 * len(places), 6.0), layout="constrained")
    grid = figure.subplots(2, len(places), squeeze=False, sharex=True)
    unit, positions = _positions(measured)
    for axes, (place, layers) in zip(grid.T, places.items(), strict=True):
        colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(layers)))
        names = [layer.name for layer in layers]
        for axis, measure in zip(axes, LABELS, strict=True):
            for name, color in zip(names, colors, strict=True):
                _draw_layer(axis, [one.layers[name] for one in measured], measure, positions, color)
            axis.grid(alpha=0.3)
        keys = {(layer.fewest_keys, layer.most_keys) for layer in layers}
        _draw_limits(axes, keys)
        axes[0].set_title(f"{place}\n{_describe(layers)}", fontsize=10)
        axes[1].set(xlabel=unit, ylim=(-0.03, 1.06))
        axes[1].xaxis.get_major_locator().set_params(integer=True)
        _add_legend(axes[1], names)
    for axis, label in zip(grid[:, 0], LABELS.values(), strict=True):
        axis.set_ylabel(label)
    figure.suptitle("thick: layers, thin: their heads, dotted: uniform attention", fontsize=9)
    return figure


def _positions(measured: Sequence[CheckpointSparsity]) -> tuple[str, list[int]]:
    """What the horizontal axis counts, and where on it the checkpoints are."""
    for unit in ("epoch", "iteration"):
        numbers = [getattr(one.checkpoint, unit) for one in measured]
        if None not in numbers and len(set(numbers)) == len(numbers):
            return unit, numbers
    return "checkpoint", list(range(1, len(measured) + 1))


def _draw_layer(
    axis: Axes, layer: Sequence[LayerSparsity], measure: str, positions: Sequence[int], color: Any
) -> None:
    """One layer over the checkpoints."""
    mean = [getattr(one.mean, measure) for one in layer]
    heads = np.array([[getattr(head, measure) for head in one.heads] for one in layer])
    single = len(positions) == 1
    axis.plot(positions, heads, "_" if single else "-", color=color, lw=0.6, alpha=0.45)
    axis.plot(positions, mean, "o-", color=color, lw=2, ms=6 if single else 3.5, zorder=3)


def _draw_limits(axes: Sequence[Axes], keys: set[tuple[int | None, int | None]]) -> None:
    """Lines at uniform attention, as far as all queries have the same number of keys."""
    counts = {count for pair in keys for count in pair}
    limits = [None, 1.0]
    if len(counts) == 1 and None not in counts:
        limits[0] = -float(np.log(counts.pop()))
    for axis, limit in zip(axes, limits, strict=True):
        if limit is not None:
            axis.axhline(limit, color="black", ls=":", lw=1.2)


def _describe(layers: Sequence[LayerSparsity]) -> str:
    """Kinds of attention and numbers of keys."""
    kinds = ", ".join(dict.fromkeys(layer.kind for layer in layers))
    counts = [n for x in layers for n in (x.fewest_keys, x.most_keys) if n is not None]
    if not counts:
        return kinds
    least, most = min(counts), max(counts)
    return f"{kinds}, {least if least == most else f'{least} to {most}'} keys"


def _add_legend(axis: Axes, names: Sequence[str]) -> None:
    """Names the layers, under the axis; of many the first, the last and some between."""
    parts = [name.split(".") for name in names]
    start = _common(parts)
    end = _common([part[::-1] for part in parts])
    if len(names) == 1:
        start, end = 0, 0
    title = ".".join(parts[0][:start]) or None
    labels = [".".join(part[start : len(part) - end]) for part in parts]
    lines = [line for line in axis.lines if line.get_zorder() == 3]
    shown = np.unique(np.linspace(0, len(names) - 1, NAMED).round().astype(int))
    axis.legend(
        [lines[index] for index in shown],
        [labels[index] for index in shown],
        title=title,
        title_fontsize=8,
        fontsize=8,
        ncols=4,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        frameon=False,
    )


def _common(names: Sequence[Sequence[str]]) -> int:
    """How many parts all names have in common, from the first."""
    same = [len(set(parts)) == 1 for parts in zip(*names, strict=False)]
    return same.index(False) if False in same else len(same)

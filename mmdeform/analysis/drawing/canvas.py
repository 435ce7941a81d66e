"""Panels, and figures that are made of them, without the global state of pyplot."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure

__all__ = [
    "ColorScale",
    "Panel",
    "assemble",
    "dimmed",
    "new_figure",
    "rounded",
    "save",
    "show",
    "to_rgb",
]

PANEL = 3.2  # width of a panel, inches
DPI = 200
TITLE = 8.5  # points
ROW_GAP = 0.25  # height of the title of a row, inches
LEGEND_ROW = 0.25  # inches


class ColorScale(NamedTuple):
    """What the colours of a figure mean: from 0 to 1."""

    colormap: Colormap
    label: str


@dataclass(frozen=True, kw_only=True)
class Panel(ABC):
    """One part of a figure: an image with something drawn over it.

    Attributes:
        title: What it shows.
        pixels: The image, shape (H, W, 3), RGB, uint8.
    """

    title: str
    pixels: np.ndarray

    @abstractmethod
    def draw(self, axis: Axes) -> None:
        """Draws image, contents and title."""

    @abstractmethod
    def numbers(self) -> dict[str, Any]:
        """What it shows, for JSON; positions (x, y) in pixels of the image."""

    @classmethod
    def fitted(cls, panels: Sequence["Panel"], width: float = PANEL) -> list["Panel"]:
        """The same panels for one figure, as wide as told, inches. Default: as they are."""
        return list(panels)

    @classmethod
    def legend(cls, panels: Sequence["Panel"]) -> dict[str, Any]:
        """Artists that explain the marks of some panels, by label. Default: none."""
        return {}

    @classmethod
    def color_scale(cls, panels: Sequence["Panel"]) -> ColorScale | None:
        """What the colours of some panels mean. Default: nothing."""
        return None


def new_figure(
    heights: Sequence[float], columns: int, extra: float = 0.0, panel: float = PANEL
) -> tuple[Figure, np.ndarray]:
    """An empty figure and its axes, shape (rows, columns).

    Args:
        heights: Height of each row of images relative to their width.
        columns: Number of columns.
        extra: Height for a legend below, inches. Default: 0.
        panel: Width of a panel, inches.
    """
    inches = [panel * height for height in heights]
    size = (columns * panel, sum(inches) + len(inches) * ROW_GAP + extra)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.01, hspace=0.01)
    axes = figure.subplots(len(heights), columns, squeeze=False, height_ratios=inches)
    return figure, axes


def show(axis: Axes, pixels: np.ndarray, title: str) -> None:
    """Draws an image so that pixel i has its centre at i, and the title."""
    height, width = pixels.shape[:2]
    axis.imshow(pixels, interpolation="bicubic")
    axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])
    axis.set_title(title, fontsize=TITLE, pad=3)


def dimmed(pixels: np.ndarray) -> np.ndarray:
    """An image on which bright marks show."""
    return (0.6 * pixels).astype(np.uint8)


def assemble(rows: Sequence[Sequence[Panel]]) -> Figure:
    """A figure of rows of panels, explained below by what the last column's panels are.

    Args:
        rows: Rows of at least one panel each; shorter ones are left blank at the end.
    """
    columns = max(len(row) for row in rows)
    kind = type(rows[0][-1])
    own = [panel for row in rows for panel in row if isinstance(panel, kind)]
    fitted = dict(zip(map(id, own), kind.fitted(own), strict=True))
    rows = [[fitted.get(id(panel), panel) for panel in row] for row in rows]
    panels = list(fitted.values())
    legend, scale = kind.legend(panels), kind.color_scale(panels)
    lines = -(-len(legend) // (2 * columns)) if legend else 0
    heights = [max(p.pixels.shape[0] / p.pixels.shape[1] for p in row) for row in rows]
    extra = LEGEND_ROW * lines + (0.4 if scale else 0)
    figure, axes = new_figure(heights, columns, extra)
    for row, of_row in zip(axes, rows, strict=True):
        for axis in row[len(of_row) :]:
            axis.set_axis_off()
        for axis, panel in zip(row, of_row, strict=False):
            panel.draw(axis)
    if scale:
        colors = ScalarMappable(Normalize(0, 1), scale.colormap)
        bar = figure.colorbar(
            colors, ax=axes, location="bottom", shrink=min(1.0, 2 / columns), aspect=45,
            pad=0.03 / len(rows), ticks=[0, 0.5, 1],
        )  # fmt: skip
        bar.outline.set_linewidth(0.5)
        bar.ax.tick_params(labelsize=7, length=2, pad=1)
        bar.set_label(scale.label, fontsize=7.5, labelpad=1)
    if legend:
        figure.legend(
            legend.values(), legend.keys(), loc="outside lower center", ncols=2 * columns,
            fontsize=7.5, frameon=False, columnspacing=1.2, handletextpad=0.4, borderaxespad=0.1,
        )  # fmt: skip
    return figure


def save(figure: Figure, path: Path, dpi: float = DPI) -> None:
    """Writes a figure; makes the folder if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)


def to_rgb(figure: Figure, dpi: float = 100) -> np.ndarray:
    """The pixels of a figure, shape (H, W, 3), RGB, uint8."""
    figure.set_dpi(dpi)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def rounded(values: Any, digits: int = 2) -> Any:
    """Numbers as lists for JSON."""
    return np.asarray(values, float).round(digits).tolist()

"""Pictures of what queries attend to, drawn without a graphical backend.

Positions are in pixels of the image, from the edge of the first one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .views import ImageView

__all__ = ["Panel", "Row", "draw_rows", "make_panels"]

WIDTH = 2.6  # of one image in the picture, inches
LARGEST = 90.0  # area of the circle of the largest weight, square points
CIRCLES = LinearSegmentedColormap.from_list("circles", ["#D55E00", "#E69F00", "#F0E442"])
HEAT = LinearSegmentedColormap.from_list(
    "heat", ["#D55E0000", "#D55E0090", "#E69F00B0", "#F0E442C0"]
)
MARK = dict(marker="*", s=130, c="#56B4E9", edgecolors="black", linewidths=0.8, zorder=5)


@dataclass(frozen=True)
class Panel:
    """What one query of a layer attends to; a map, or samples.

    Attributes:
        title: What it shows.
        weights: Map of attention, shape (H, W), or weights of the samples, shape (n,).
        cell: (width, height) of a pixel of the map; None of samples.
        points: The samples (x, y), shape (n, 2); None of a map.
        box: What the query detects, (left, top, right, bottom); None of an encoder query.
    """

    title: str
    weights: np.ndarray
    cell: tuple[float, float] | None = None
    points: np.ndarray | None = None
    box: Sequence[float] | None = None


@dataclass(frozen=True)
class Row:
    """An object or a pixel, and what queries for it attend to.

    Attributes:
        title: What it is.
        panels: What the queries attend to.
        box: Of the object, (left, top, right, bottom).
        point: Where the pixel is, (x, y).
    """

    title: str
    panels: Sequence[Panel]
    box: Sequence[float] | None = None
    point: Sequence[float] | None = None


def make_panels(
    view: ImageView,
    layer: str,
    query: int,
    scale: tuple[float, float],
    heads: Sequence[int] = (),
    title: str = "",
    box: Sequence[float] | None = None,
) -> list[Panel]:
    """What one query attends to: a map for all heads together, or for each of some.

    Before the map of deformable attention there is a panel with its samples.

    Args:
        view: The image.
        layer: Name of a layer.
        query: Index of the query.
        scale: (x, y) size of the network's image relative to the image.
        heads: Indices of heads. Default: none, their mean.
        title: What titles begin with. Default: nothing.
        box: See :class:`Panel`.

    Raises:
        ValueError: A head does not exist.
    """
    attention_map = view.attention_map(layer, query)
    maps = attention_map.weights.cpu().numpy()
    for head in heads:
        if not 0 <= head < len(maps):
            raise ValueError(f"head must be between 0 and {len(maps) - 1} in {layer}, got {head}")
    cell = (attention_map.cell[0] / scale[0], attention_map.cell[1] / scale[1])
    samples = None
    if view.attentions[layer].sampling is not None:
        samples = view.samples(layer, query)
        points = samples.in_input(view.size).cpu().numpy() / scale
        weights = samples.weights.cpu().numpy()
    panels = []
    for head in heads or (None,):
        name = f"{title}attention, " + ("mean of heads" if head is None else f"head {head}")
        chosen = slice(None) if head is None else slice(head, head + 1)
        if samples is not None:
            panels.append(
                Panel(
                    f"{title}samples" + ("" if head is None else f" of head {head}"),
                    weights[chosen].ravel(),
                    points=points[chosen].reshape(-1, 2),
                    box=box,
                )
            )
        weights_map = maps[chosen].mean(0)
        ratio = float(weights_map.max() / weights_map.mean())
        panels.append(Panel(f"{name}\nlargest = {ratio:.3g} x mean", weights_map, cell, box=box))
    return panels


def draw_rows(image: np.ndarray, rows: Sequence[Row]) -> Figure:
    """Draws a row of panels for each query, the image with the query first.

    Args:
        image: Shape (H, W, 3), RGB.
        rows: All with the same number of panels.
    """
    height, width = image.shape[:2]
    columns = 1 + len(rows[0].panels)
    size = (WIDTH * columns, (WIDTH * height / width + 0.35) * len(rows) + 0.15)
    figure = Figure(size, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.06)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    gray = (0.45 * image.mean(-1, keepdims=True) + 0.2 * image).astype(np.uint8)
    for axes, row in zip(grid, rows, strict=True):
        for axis, panel in zip(axes, (None, *row.panels), strict=True):
            pixels = image if panel is None else gray
            axis.imshow(pixels, extent=(0, width, height, 0), interpolation="bicubic")
            if panel is not None:
                _draw_attention(axis, panel)
            _draw_query(axis, row.box if panel is None else panel.box, row.point)
            axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
            axis.set_title(row.title if panel is None else panel.title, fontsize=8)
    figure.supxlabel("colour, area: share of the largest weight in a panel", fontsize=8)
    return figure


def _draw_attention(axis: Axes, panel: Panel) -> None:
    largest = max(float(panel.weights.max()), 1e-12)
    if panel.points is None:
        rows, columns = panel.weights.shape
        extent = (0, columns * panel.cell[0], rows * panel.cell[1], 0)
        axis.imshow(panel.weights / largest, cmap=HEAT, vmin=0, vmax=1, extent=extent)
        return
    order = np.argsort(-panel.weights)  # small circles on top of large ones
    shares = panel.weights[order] / largest
    axis.scatter(
        *panel.points[order].T,
        s=LARGEST * shares,
        c=shares,
        cmap=CIRCLES,
        vmin=0,
        vmax=1,
        alpha=0.85,
        edgecolors="black",
        linewidths=0.3,
    )


def _draw_query(axis: Axes, box: Sequence[float] | None, point: Sequence[float] | None) -> None:
    if box is not None:
        left, top, right, bottom = box
        size = (right - left, bottom - top)
        axis.add_patch(Rectangle((left, top), *size, fill=False, ec="#56B4E9", lw=1.6))
    if point is not None:
        axis.scatter(*point, **MARK)

"""Pictures of spatial support: what is drawn on an axis of matplotlib over the image."""

import textwrap
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..detectors import Picture

__all__ = ["draw_field", "draw_image", "draw_region", "draw_samples", "make_figure"]

PANEL = 3.4  # width of one image in the picture, inches
TITLE = 48  # letters of a line
CAPTION = "brightness: square root of the gradient, relative to the largest of its panel"
MARK = dict(color="#56B4E9", zorder=5)
SAMPLES = "plasma"
FIELD = "inferno"


def draw_image(axis: Axes, picture: Picture, shade: float = 1.0, gray: bool = False) -> None:
    """The image, in colour or gray, darkened by a factor."""
    pixels = picture.pixels.astype(float)
    if gray:
        pixels = pixels.mean(-1, keepdims=True).repeat(3, -1)
    axis.imshow((shade * pixels).astype(np.uint8), interpolation="bicubic")
    width, height = picture.size
    axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])


def draw_node(axis: Axes, position: Sequence[float], box: Sequence[float] | None) -> None:
    """A cross at a node, and its box, (x1, y1, x2, y2), if it has one.

    Both in pixels of the image; the box in those which reach from i to i + 1.
    """
    if box is None:
        for color, size, width in (("black", 13, 4), (MARK["color"], 12, 2)):
            axis.plot(*position, "+", color=color, markersize=size, markeredgewidth=width, zorder=5)
        return
    x1, y1, x2, y2 = box
    for color, width in (("black", 3), (MARK["color"], 1.5)):
        axis.add_patch(
            Rectangle(
                (x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, ec=color, lw=width, zorder=5
            )
        )


def draw_field(axis: Axes, picture: Picture, field: np.ndarray) -> None:
    """A map of gradients over the image, the stronger the brighter, by its square root.

    Args:
        axis: Where to draw.
        picture: The image.
        field: Norms, not negative, shape (h, w), in pixels of what the network gets, without
            padding.
    """
    draw_image(axis, picture, 0.35, gray=True)
    heat = _brightness(field)
    height, width = field.shape
    left, upper = picture.from_inputs((-0.5, -0.5))
    right, lower = picture.from_inputs((width - 0.5, height - 0.5))
    axis.imshow(
        heat, cmap=FIELD, vmin=0, vmax=1, alpha=np.minimum(1, 1.5 * heat),
        extent=(left, right, lower, upper), interpolation="nearest",
    )  # fmt: skip


def _brightness(norms: np.ndarray) -> np.ndarray:
    """From 0 to 1, which the largest thousandth share, so that one outlier does not darken all."""
    top = np.quantile(norms, 0.999) or norms.max() or 1.0
    return np.sqrt(np.clip(norms / top, 0, 1))


def draw_samples(
    axis: Axes, picture: Picture, points: np.ndarray, norms: np.ndarray, bins: bool = False
) -> None:
    """Sampling locations, coloured by gradient norm, the largest on top.

    Args:
        axis: Where to draw.
        picture: The image.
        points: (x, y) in pixels of what the network gets, shape (P, 2).
        norms: Shape (P,).
        bins: Whether they are bins of RoI pooling, which are drawn as squares. Default: False.
    """
    draw_image(axis, picture, 0.5, gray=True)
    if not len(points):
        return
    order = np.argsort(norms, kind="stable")
    shares = _brightness(norms)[order]
    axis.scatter(
        *picture.from_inputs(points)[order].T, s=(24 if bins else 9) * (0.3 + 0.7 * shares),
        c=shares, cmap=SAMPLES, vmin=0, vmax=1, marker="s" if bins else "o", linewidths=0, zorder=3,
    )  # fmt: skip


def draw_region(axis: Axes, picture: Picture, mask: np.ndarray) -> None:
    """What is kept of the image in colour, the rest dark.

    Args:
        axis: Where to draw.
        picture: The image.
        mask: Bool, shape (h, w), in pixels of what the network gets, without padding.
    """
    width, height = picture.size
    y, x = np.mgrid[:height, :width]
    columns, rows = picture.to_inputs(np.stack([x, y], -1)).round().astype(int).transpose(2, 0, 1)
    kept = mask[rows.clip(0, mask.shape[0] - 1), columns.clip(0, mask.shape[1] - 1)]
    draw_image(axis, picture)
    veil = np.zeros((height, width, 4))
    veil[~kept] = (0, 0, 0, 0.75)
    axis.imshow(veil, interpolation="nearest")
    if kept.any() and not kept.all():
        axis.contour(kept, [0.5], colors=["white"], linewidths=0.6)


def make_figure(
    picture: Picture, rows: Sequence[Sequence[tuple[str, Callable[[Axes], None]]]]
) -> Figure:
    """Rows of panels with titles.

    Args:
        picture: The image, which gives the shape of a panel.
        rows: Title of each panel, and what draws it.
    """
    columns = max(map(len, rows))
    width, height = picture.size
    figure = Figure(
        figsize=(columns * PANEL, len(rows) * (PANEL * height / width + 0.5) + 0.2),
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, panels in zip(axes, rows, strict=True):
        for axis, (title, draw) in zip(row, panels, strict=False):
            draw(axis)
            axis.set_title(textwrap.fill(title, TITLE), fontsize=8)
        for axis in row[len(panels) :]:
            axis.set_axis_off()
    figure.supxlabel(CAPTION, fontsize=7)
    return figure

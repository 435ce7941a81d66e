"""Samples of multi-scale deformable attention, as in the figures of Deformable DETR."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.path import Path
from matplotlib.transforms import IdentityTransform

from ..detections import Place, nearest_box
from ..recording import AttentionCall
from ..scene import Scene
from .canvas import ColorScale, Panel, dimmed, rounded, show
from .detections import color_of, draw_box

__all__ = ["AttentionPanel", "attention_panel", "choose_attention"]

COLORMAP = LinearSegmentedColormap.from_list("weights", ["#7CC8FF", "#FFE650", "#FF2E12"])
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # of levels
REFERENCE = dict(marker="+", s=110, linewidths=2.2)


@dataclass(frozen=True, kw_only=True)
class AttentionPanel(Panel):
    """What one query samples.

    Attributes:
        layer: Name of the layer.
        query: Index of the query.
        reference: Its reference point (x, y) in pixels of the image.
        points: Where it samples, shape (P, 2).
        weights: Attention weights, shape (P,).
        levels, heads: Level and head of each sample, shape (P,).
        box: Box (x1, y1, x2, y2) that the query predicts, where pixel i reaches from i to i + 1;
            None for queries that are pixels.
        label: Class of the box, for its colour.
        strides: (x, y) of each level relative to what the network gets, shape (L, 2).
    """

    layer: str
    query: int
    reference: np.ndarray
    points: np.ndarray
    weights: np.ndarray
    levels: np.ndarray
    heads: np.ndarray
    box: np.ndarray | None
    label: int | None
    strides: np.ndarray

    def draw(self, axis: Axes) -> None:
        show(axis, dimmed(self.pixels), self.title)
        if self.box is not None:
            draw_box(axis, self.box, ec=color_of(self.label), lw=1.5)
        shares = self.weights / (self.weights.max(initial=0) or 1.0)
        order = np.argsort(shares)  # the heaviest on top
        axis.add_collection(
            PathCollection(
                [_marker(level) for level in self.levels[order]],
                sizes=10 + 30 * shares[order],
                facecolors=COLORMAP(shares[order]),
                edgecolors="black",
                linewidths=0.3,
                offsets=self.points[order],
                offset_transform=axis.transData,
                transform=IdentityTransform(),
            )
        )
        axis.scatter(*self.reference, c="black", **{**REFERENCE, "s": 130, "linewidths": 4})
        axis.scatter(*self.reference, c="lime", **REFERENCE)

    def numbers(self) -> dict[str, Any]:
        return dict(
            layer=self.layer,
            query=self.query,
            reference_point=rounded(self.reference),
            box=None if self.box is None else rounded(self.box),
            points=rounded(self.points),
            weights=rounded(self.weights, 5),
            levels=self.levels.tolist(),
            heads=self.heads.tolist(),
            level_strides=rounded(self.strides),
        )

    @classmethod
    def legend(cls, panels: Sequence[Panel]) -> dict[str, Any]:
        entries = {}
        strides = max((panel.strides for panel in panels), key=len)
        for level in sorted({int(level) for panel in panels for level in panel.levels}):
            x, y = (f"{stride:.3g}" for stride in strides[level])
            entries[f"level of stride {x}" if x == y else f"level of stride {x} x {y}"] = Line2D(
                [], [], linestyle="none", marker=MARKERS[level % len(MARKERS)], color=COLORMAP(0.5),
                markeredgecolor="black", markeredgewidth=0.3, markersize=5,
            )  # fmt: skip
        entries["reference point"] = Line2D(
            [], [], linestyle="none", marker="+", color="limegreen", markersize=8, markeredgewidth=2
        )
        return entries

    @classmethod
    def color_scale(cls, panels: Sequence[Panel]) -> ColorScale:
        return ColorScale(COLORMAP, "attention weight, relative to the largest of the panel")


def attention_panel(
    scene: Scene, call: AttentionCall, place: Place, head: int | None = None
) -> AttentionPanel:
    """What a query samples for a place.

    Args:
        scene: The image and what a detector made of it.
        call: Recorded call.
        place: What to look at. Where queries are pixels: the pixel of the finest level that is
            nearest to its position. Object queries: its query; otherwise, of its box, the query
            whose box has the nearest sides; otherwise the query whose reference point is nearest.
        head: The one head to show. Default: all.

    Raises:
        ValueError: There is no such query or head.
    """
    scene.check(place)
    picture = scene.picture
    query = _query(scene, call, place)
    samples = call.samples(query)
    heads = int(samples.groups.max()) + 1
    if head is not None and not 0 <= head < heads:
        raise ValueError(f"head must be between 0 and {heads - 1} in {call.name}, but got {head}")
    own = slice(None) if head is None else (samples.groups == head).cpu()
    box = None
    if not call.is_encoder and scene.query_boxes is not None:
        box = scene.query_boxes[query]
    width, height = call.image_size
    strides = [(width / w, height / h) for w, h in call.level_sizes]
    what = "pixel" if call.is_encoder else f"query {query}"
    return AttentionPanel(
        title=f"{'encoder' if call.is_encoder else 'decoder'}, {what}: {place.name}",
        pixels=picture.pixels,
        layer=call.name,
        query=query,
        reference=picture.from_inputs(samples.center),
        points=picture.from_inputs(samples.points)[own],
        weights=samples.weights.double().cpu().numpy()[own],
        levels=samples.levels.cpu().numpy()[own],
        heads=samples.groups.cpu().numpy()[own],
        box=box,
        label=place.label,
        strides=np.array(strides),
    )


def _marker(level: int) -> Path:
    """Outline of the mark of a level, of size 1."""
    style = MarkerStyle(MARKERS[level % len(MARKERS)])
    return style.get_path().transformed(style.get_transform())


def _query(scene: Scene, call: AttentionCall, place: Place) -> int:
    centers = call.centers().double().cpu().numpy()
    if call.is_encoder:
        width, height = call.level_sizes[0]
        centers = centers[: width * height]
    elif place.query is not None:
        if not 0 <= place.query < len(centers):
            raise ValueError(
                f"query must be between 0 and {len(centers) - 1} in {call.name}, "
                f"but got {place.query}"
            )
        return place.query
    elif place.box is not None and scene.query_boxes is not None:
        return nearest_box(scene.query_boxes, place.box)
    return int(((centers - scene.picture.to_inputs(place.position)) ** 2).sum(1).argmin())


def choose_attention(calls: Sequence[AttentionCall]) -> list[AttentionCall]:
    """The last layer whose queries are pixels, and the last whose queries are objects."""
    last = {call.is_encoder: call for call in calls}
    return [last[encoder] for encoder in (True, False) if encoder in last]

"""Bins of deformable RoI pooling over an RoI, as in figures 7 and 8 of DCNv1."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from ..detections import Place, nearest_box
from ..recording import RoIPoolingCall
from ..scene import Scene
from .canvas import Panel, dimmed, rounded, show
from .detections import draw_box

__all__ = ["RoIPoolingPanel", "choose_pooling", "roi_pooling_panel"]

BIN, ROI, GRID = "#FF5A36", "#F0E442", "white"
MARGIN = 0.25  # around RoI and bins, as a share of their size
LEAST = 0.3  # share of the width of the image that is shown at least


@dataclass(frozen=True, kw_only=True)
class RoIPoolingPanel(Panel):
    """Where the bins of one RoI have moved.

    Attributes:
        layer: Name of the layer.
        roi: (x1, y1, x2, y2) in pixels of the image, where pixel i reaches from i to i + 1.
        centers: Centres of the bins with their offsets, shape (bins, 2); pixel i has its centre
            at i.
        regular: The same without offsets, shape (bins, 2).
        bin_size: (width, height) of a bin.
        weights: Mask of each bin, shape (bins,); None where the layer has none.
        group: Class whose offsets these are; 0 where all classes share them.
    """

    layer: str
    roi: np.ndarray
    centers: np.ndarray
    regular: np.ndarray
    bin_size: np.ndarray
    weights: np.ndarray | None
    group: int

    def draw(self, axis: Axes) -> None:
        show(axis, dimmed(self.pixels), self.title)
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) / 2 * self.bin_size
        add = axis.add_collection
        add(PolyCollection(self.regular[:, None] + corners, fc="none", ec=GRID, lw=0.5, alpha=0.7))
        lines = np.stack([self.regular, self.centers], 1)
        add(LineCollection(lines, colors=GRID, linewidths=0.8, alpha=0.9))
        shares = np.ones(len(self.centers))
        if self.weights is not None:
            shares = self.weights / (self.weights.max() or 1.0)
        faces = [(*_rgb(BIN), 0.4 * share) for share in shares]
        edges = [(*_rgb(BIN), 0.2 + 0.8 * share) for share in shares]
        add(PolyCollection(self.centers[:, None] + corners, fc=faces, ec=edges, lw=1.0))
        axis.scatter(*self.centers.T, s=5, c=edges, linewidths=0)
        draw_box(axis, self.roi, ec=ROI, lw=1.8)
        self._zoom(axis)

    def _zoom(self, axis: Axes) -> None:
        """Shows RoI and bins with a margin, in the aspect of the image, as far as it reaches."""
        height, width = self.pixels.shape[:2]
        half = self.bin_size / 2
        points = np.concatenate(
            [self.roi.reshape(2, 2) - 0.5, self.centers - half, self.centers + half]
        )
        low, high = points.min(0), points.max(0)
        scale = ((high - low) / (width, height)).max() * (1 + 2 * MARGIN)
        size = np.array([width, height]) * np.clip(scale, LEAST, 1)
        start = np.clip((low + high - size) / 2, -0.5, np.array([width, height]) - 0.5 - size)
        axis.set(xlim=(start[0], start[0] + size[0]), ylim=(start[1] + size[1], start[1]))

    def numbers(self) -> dict[str, Any]:
        return dict(
            layer=self.layer,
            roi=rounded(self.roi),
            bin_size=rounded(self.bin_size),
            group=self.group,
            bin_centers=rounded(self.centers),
            regular_bin_centers=rounded(self.regular),
            weights=None if self.weights is None else rounded(self.weights, 4),
        )

    @classmethod
    def legend(cls, panels: Sequence[Panel]) -> dict[str, Any]:
        masked = any(panel.weights is not None for panel in panels)
        return {
            "RoI": Rectangle((0, 0), 1, 1, fill=False, ec="#B8A900", lw=1.8),
            "bin, as opaque as its mask" if masked else "bin": Rectangle(
                (0, 0), 1, 1, fc=(*_rgb(BIN), 0.4), ec=BIN
            ),
            "bin without offset": Rectangle((0, 0), 1, 1, fill=False, ec="0.6", lw=0.6),
            "offset": Line2D([], [], color="0.6", linewidth=0.8),
        }


def roi_pooling_panel(
    scene: Scene, calls: Sequence[RoIPoolingCall], place: Place
) -> RoIPoolingPanel:
    """Bins of the RoI of a place.

    Args:
        scene: The image and what a detector made of it.
        calls: Calls whose RoIs are looked through, e.g. of all levels; see :func:`choose_pooling`.
        place: What to look at: of its box the RoI with the nearest sides, otherwise the RoI whose
            centre is nearest. Of classes with own offsets its class counts, or the last one, which
            is the background.

    Raises:
        ValueError: No RoI was pooled.
    """
    scene.check(place)
    rois = [(call, index) for call in calls for index in range(len(call.rois))]
    if not rois:
        raise ValueError(f"{calls[0].name} pooled no RoI of {scene.picture.path.name}")
    boxes = np.concatenate([call.rois[:, 1:].double().cpu().numpy() for call in calls])
    if place.box is not None:
        chosen = nearest_box(boxes, scene.box_in_inputs(place.box))
    else:
        centers = boxes.reshape(-1, 2, 2).mean(1) - 0.5
        chosen = int(((centers - scene.picture.to_inputs(place.position)) ** 2).sum(1).argmin())
    call, index = rois[chosen]
    samples = call.samples(index)
    groups = int(samples.groups.max()) + 1
    group = place.label if groups > 1 and place.label is not None else groups - 1
    own = samples.groups == group
    rows, columns = call.layer.output_size
    size = call.bin_sizes[index].double().cpu().numpy()
    y, x = np.divmod(np.arange(rows * columns), columns)
    regular = boxes[chosen, :2] + (np.stack([x, y], 1) + 0.5) * size - 0.5
    # Of position-sensitive pooling the mean of the samples is not the centre of the bin.
    moved = (samples.points - samples.regular)[own].double().cpu().numpy()
    weights = None if call.weights is None else samples.weights[own].cpu().numpy()
    return RoIPoolingPanel(
        title=f"{rows} x {columns} bins for: {place.name}",
        pixels=scene.picture.pixels,
        layer=call.name,
        roi=scene.box_from_inputs(boxes[chosen]),
        centers=scene.picture.from_inputs(regular + moved),
        regular=scene.picture.from_inputs(regular),
        bin_size=size / scene.picture.scale,
        weights=weights,
        group=group,
    )


def choose_pooling(calls: Sequence[RoIPoolingCall]) -> list[RoIPoolingCall]:
    """The layers that ran first, with all levels: where names differ in a last number alone."""
    parent = _parent(calls[0].name)
    return [call for call in calls if _parent(call.name) == parent]


def _parent(name: str) -> str:
    parent, _, last = name.rpartition(".")
    return parent if last.isdigit() else name


def _rgb(color: str) -> tuple[float, float, float]:
    return tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))

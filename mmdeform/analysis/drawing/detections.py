"""The image with what the detector found."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from ..detections import Detection
from ..scene import Scene
from .canvas import Panel, rounded, show

__all__ = ["DetectionsPanel", "color_of", "draw_box"]

COLORS = colormaps["Set2"].colors


def color_of(label: int | None) -> tuple[float, float, float]:
    """Colour of a class."""
    return COLORS[(label or 0) % len(COLORS)]


def draw_box(axis: Axes, box: Sequence[float], **style: Any) -> None:
    """Outlines a box (x1, y1, x2, y2), where pixel i reaches from i to i + 1."""
    left, top, right, bottom = np.asarray(box, float) - 0.5
    axis.add_patch(Rectangle((left, top), right - left, bottom - top, **{"fill": False, **style}))


def draw_name(axis: Axes, box: Sequence[float], text: str, label: int | None) -> None:
    """Writes a name over a box, inside where there is no room above, left where none at right."""
    height, width = (abs(end - start) for start, end in (axis.get_ylim(), axis.get_xlim()))
    at_right = box[0] > 0.75 * width
    side = float(np.clip(box[2 if at_right else 0], 0, width))
    top = float(max(box[1], 0))
    axis.text(
        side - 0.5,
        top - 0.5,
        text,
        fontsize=7,
        ha="right" if at_right else "left",
        va="bottom" if top > 0.05 * height else "top",
        bbox=dict(fc=color_of(label), ec="none", pad=1),
        clip_on=True,
    )


@dataclass(frozen=True, kw_only=True)
class DetectionsPanel(Panel):
    """Boxes, masks, classes and scores of detections."""

    found: Sequence[Detection]

    @classmethod
    def of(cls, scene: Scene, least_score: float = 0.5) -> "DetectionsPanel":
        """Detections of at least this score."""
        found = scene.detections(least_score)
        return cls(title="detections", pixels=scene.picture.pixels, found=found)

    def draw(self, axis: Axes) -> None:
        show(axis, self.pixels, self.title)
        for detection in self.found:
            color = color_of(detection.label)
            if detection.has_mask:
                axis.contour(detection.mask, [0.5], colors=[color], linewidths=1.6)
            draw_box(axis, detection.box, ec=color, lw=1.0 if detection.has_mask else 1.6)
        for detection in reversed(self.found):  # over all boxes, the best on top
            text = f"{detection.name} {detection.score:.2f}"
            draw_name(axis, detection.box, text, detection.label)

    def numbers(self) -> dict[str, Any]:
        return dict(
            detections=[
                dict(name=found.name, score=round(found.score, 4), box=rounded(found.box))
                for found in self.found
            ]
        )

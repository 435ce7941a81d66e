"""Sampling points of stacked deformable convolutions, as in figure 5 of DCNv1."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ..detections import Place
from ..recording import ConvolutionCall
from ..scene import Scene
from ..tracing import trace_points
from .canvas import ColorScale, Panel, dimmed, rounded, show

__all__ = ["ConvolutionPanel", "choose_stack", "convolution_panel"]

COLORMAP = colormaps["autumn"]
REACH = 0.2  # of the shorter side of the image: how far stacks of undeformed layers may look


@dataclass(frozen=True, kw_only=True)
class ConvolutionPanel(Panel):
    """What one output reads through several layers.

    Attributes:
        layers: Names of the layers, in the order in which they run.
        position: (x, y) of the output in pixels of the image.
        points: Where it samples, shape (P, 2).
        weights: Products of the modulations on the way, shape (P,).
        regular: Where it would without offsets, shape (P', 2).
        group: Deform group.
    """

    layers: Sequence[str]
    position: tuple[float, float]
    points: np.ndarray
    weights: np.ndarray
    regular: np.ndarray
    group: int

    def draw(self, axis: Axes) -> None:
        show(axis, dimmed(self.pixels), self.title)
        order = np.argsort(self.weights)
        largest = np.abs(self.weights).max(initial=0) or 1.0
        axis.scatter(*np.unique(self.regular.round(2), axis=0).T, s=5, c="white", linewidths=0)
        axis.scatter(
            *self.points[order].T, s=9 if len(self.points) > 100 else 16, linewidths=0,
            c=self.weights[order] / largest, cmap=COLORMAP, vmin=0, vmax=1,
        )  # fmt: skip
        axis.plot(*self.position, "+", color="black", markersize=13, markeredgewidth=4)
        axis.plot(*self.position, "+", color="lime", markersize=12, markeredgewidth=2)

    def numbers(self) -> dict[str, Any]:
        return dict(
            layers=list(self.layers),
            position=rounded(self.position),
            group=self.group,
            points=rounded(self.points),
            weights=rounded(self.weights, 4),
            regular_points=rounded(self.regular),
        )

    @classmethod
    def legend(cls, panels: Sequence[Panel]) -> dict[str, Any]:
        dot = dict(linestyle="none", marker="o", markeredgewidth=0)
        return {
            "sampled": Line2D([], [], color=COLORMAP(0.5), markersize=4, **dot),
            "without offsets": Line2D(
                [], [], color="white", linestyle="none", marker="o", markersize=3.5,
                markeredgewidth=0.4, markeredgecolor="0.4",
            ),
            "output": Line2D(
                [], [], linestyle="none", marker="+", color="limegreen", markersize=8,
                markeredgewidth=2,
            ),
        }  # fmt: skip

    @classmethod
    def color_scale(cls, panels: Sequence[Panel]) -> ColorScale | None:
        if all(np.ptp(panel.weights) == 0 for panel in panels if len(panel.weights)):
            return None  # version 1
        layers = max(len(panel.layers) for panel in panels)
        of = f"product of the modulations of {layers} layers" if layers > 1 else "modulation"
        return ColorScale(COLORMAP, f"{of}, relative to the largest of the panel")


def convolution_panel(
    scene: Scene, calls: Sequence[ConvolutionCall], place: Place, group: int = 0
) -> ConvolutionPanel:
    """What the output nearest to a place reads through some layers in a row.

    Args:
        scene: The image and what a detector made of it.
        calls: Recorded calls in the order in which they ran; see :func:`choose_stack`.
        place: Where to look.
        group: Deform group. Default: 0.
    """
    scene.check(place)
    picture = scene.picture
    x, y = picture.to_inputs(place.position)
    output = calls[-1].centers()[calls[-1].nearest(x, y)]
    regular, _ = trace_points(calls, x, y, group=group, offsets=False)
    points, weights = trace_points(calls, x, y, group=group)
    return ConvolutionPanel(
        title=f"sampled for: {place.name}",
        pixels=picture.pixels,
        layers=[call.name for call in calls],
        position=tuple(picture.from_inputs(output)),
        points=picture.from_inputs(points),
        weights=weights.cpu().numpy(),
        regular=picture.from_inputs(regular),
        group=group,
    )


def choose_stack(calls: Sequence[ConvolutionCall], depth: int) -> list[ConvolutionCall]:
    """Layers in a row through which to look if nobody chooses.

    In a backbone, the last up to ``depth`` layers with outputs of the same stride: of the coarsest
    stride at which they look, without offsets, no farther than a fifth of the image's shorter side
    in each direction, or else of the finest. Elsewhere layers run beside each other, for branches
    and levels, so it is one call: the coarsest by the same rule.

    Args:
        calls: Calls of deformable convolutions in the order in which they ran.
        depth: Number of layers at most.
    """
    backbone = [call for call in calls if "backbone" in call.name.split(".")]
    candidates: dict[tuple[float, float], list[ConvolutionCall]] = {}
    for call in backbone or calls:
        candidates.setdefault(call.output_grid.stride, []).append(call)
    stacks = [stack[-depth if backbone else -1 :] for stack in candidates.values()]
    stacks.sort(key=reach)
    limit = REACH * min(calls[0].image_size)
    return [stack for stack in stacks if reach(stack) <= limit or stack is stacks[0]][-1]


def reach(calls: Sequence[ConvolutionCall]) -> float:
    """How far a stack looks in each direction without offsets, pixels of the image."""
    return sum(
        max(
            stride * dilation * (kernel - 1) / 2
            for stride, dilation, kernel in zip(
                call.map_grid.stride, call.layer.dilation[::-1], call.layer.kernel_size[::-1],
                strict=True,
            )
        )
        for call in calls
    )  # fmt: skip

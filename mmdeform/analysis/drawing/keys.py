"""Keys of deformable attention of DAT, sized by the attention that they get."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from ..detectors import Picture
from ..recording import KeysCall
from .canvas import PANEL, Panel, rounded, show

__all__ = [
    "KeysPanel",
    "choose_keys",
    "keys_panel",
    "queries_within",
    "weights_of_keys",
]

LARGEST = 110.0  # area of the circle of the largest attention, square points, if there is room
DOT = 0.015  # area of the dot of a key relative to that
COVERED = 0.3  # share of an image that circles cover at most
STRIDE = 16  # of the layer to look at if nobody chooses, pixels of the image
ORANGES = LinearSegmentedColormap.from_list("oranges", ["#D55E00", "#E69F00", "#F0E442"])
QUERY = dict(marker="*", s=130, c="#56B4E9", edgecolors="black", linewidths=0.8)


@dataclass(frozen=True, kw_only=True)
class KeysPanel(Panel):
    """Keys of one layer, and what one query, or all, make of them.

    Attributes:
        layer: Name of the layer.
        points: The keys (x, y) in pixels of the image, shape (P, 2).
        references: Where they would be without offsets, shape (P, 2).
        weights: Their attention, shape (P,).
        groups: Their groups, shape (P,).
        query: Centre (x, y) of the query; None: the average of all queries.
        offsets: Whether to draw how the keys have moved.
        largest: Area of the circle of the largest attention, square points.
    """

    layer: str
    points: np.ndarray
    references: np.ndarray
    weights: np.ndarray
    groups: np.ndarray
    query: np.ndarray | None
    offsets: bool = False
    largest: float = LARGEST

    @property
    def shares(self) -> np.ndarray:
        """Attention relative to the largest, shape (P,)."""
        return self.weights / self.weights.max()

    def draw(self, axis: Axes) -> None:
        gray = self.pixels.mean(-1, keepdims=True)
        show(axis, (0.4 * gray + 0.35 * self.pixels).astype(np.uint8), self.title)
        if self.offsets:
            lines = np.stack([self.references, self.points], 1)
            axis.add_collection(LineCollection(lines, colors="white", linewidths=0.4, alpha=0.6))
        axis.scatter(*self.points.T, s=DOT * self.largest, c="white", linewidths=0)
        order = np.argsort(-self.shares)  # small circles on top of large ones
        axis.scatter(
            *self.points[order].T,
            s=self.largest * self.shares[order],
            c=self.shares[order],
            cmap=ORANGES,
            vmin=0,
            vmax=1,
            alpha=0.85,
            **_edge(self.largest),
        )
        if self.query is not None:
            axis.scatter(*self.query, **QUERY)

    def numbers(self) -> dict[str, Any]:
        return dict(
            layer=self.layer,
            query_position=None if self.query is None else rounded(self.query),
            points=rounded(self.points),
            regular_points=rounded(self.references),
            weights=rounded(self.weights, 6),
            groups=self.groups.tolist(),
        )

    @classmethod
    def fitted(cls, panels: Sequence[Panel], width: float = PANEL) -> list[Panel]:
        """With circles of one scale that leave room in all panels."""
        largest = LARGEST
        for panel in panels:
            height = width * panel.pixels.shape[0] / panel.pixels.shape[1]
            largest = min(largest, COVERED * width * height * 72**2 / float(panel.shares.sum()))
        return [dataclasses.replace(panel, largest=largest) for panel in panels]

    @classmethod
    def legend(cls, panels: Sequence[Panel]) -> dict[str, Any]:
        largest = panels[0].largest
        scatter = Figure().add_subplot().scatter  # of a figure that nobody sees
        entries = {
            label: scatter([], [], s=largest * share, color=ORANGES(share), **_edge(largest))
            for label, share in (("10%", 0.1), ("50%", 0.5), ("100% of the largest attention", 1.0))
        }
        entries["key"] = scatter([], [], s=4, c="0.6", linewidths=0)
        if any(panel.offsets for panel in panels):
            entries["offset"] = Line2D([], [], color="0.6", linewidth=0.8)
        if any(panel.query is not None for panel in panels):
            entries["query"] = scatter([], [], **QUERY)
        return entries


def keys_panel(
    picture: Picture,
    call: KeysCall,
    position: tuple[float, float] | None,
    title: str,
    head: int | None = None,
    group: int | None = None,
    offsets: bool = False,
) -> KeysPanel:
    """Finds out what a panel shows.

    Args:
        picture: The image.
        call: What a layer has made of it.
        position: Position (x, y) in the image; the nearest query is shown. None: the average of
            all queries whose centres are in the image.
        title: What it shows; how selective the attention is follows.
        head, group: See :func:`weights_of_keys`.
        offsets: Whether to draw how the keys have moved. Default: False.
    """
    centers, centre = call.centers(), None
    if position is None:
        queries = queries_within(picture, call)
    else:
        queries = torch.tensor([call.nearest(*picture.to_inputs(position))], device=centers.device)
        centre = picture.from_inputs(centers[queries[0]])
    chosen, weights = weights_of_keys(call, queries, head, group)
    points, references = (
        picture.from_inputs(positions[0, chosen].reshape(-1, 2))
        for positions in (call.locations, call.grid.expand_as(call.locations))
    )
    ratio = float(weights.max() / weights.mean())
    return KeysPanel(
        title=f"{title}, largest = {ratio:.3g} x mean",
        pixels=picture.pixels,
        layer=call.name,
        points=points,
        references=references,
        weights=weights.flatten().double().cpu().numpy(),
        groups=np.repeat(chosen, weights.shape[1]),
        query=centre,
        offsets=offsets,
    )


def queries_within(picture: Picture, call: KeysCall) -> Tensor:
    """Indices of the queries whose centres lie in the image and not in its padding."""
    size = np.multiply(picture.size, picture.scale)
    centers = call.centers()
    inside = (centers < centers.new_tensor(size - 0.5)).all(1)
    return inside.nonzero().flatten()


def weights_of_keys(
    call: KeysCall, queries: Tensor, head: int | None, group: int | None
) -> tuple[list[int], Tensor]:
    """Groups to draw and the weights of their keys.

    Args:
        call: Recorded keys.
        queries: Indices of the queries over which weights are averaged.
        head: The one head to take weights from. Default: None, the average over a group.
        group: The one group to draw. Default: None, the group of ``head``, or all.

    Returns:
        Indices of groups, and weights, shape (groups, Ns).

    Raises:
        ValueError: There is no such head or group.
    """
    groups = call.locations.shape[1]
    weights = call.attention(queries)  # (M, Ns)
    for name, index, count in (("head", head, len(weights)), ("group", group, groups)):
        if index is not None and not 0 <= index < count:
            raise ValueError(
                f"{name} must be between 0 and {count - 1} in {call.name}, but got {index}"
            )
    if head is not None:
        return [head * groups // len(weights)], weights[head, None]
    chosen = list(range(groups)) if group is None else [group]
    return chosen, weights.unflatten(0, (groups, -1)).mean(1)[chosen]


def choose_keys(calls: Sequence[KeysCall]) -> KeysCall:
    """The last layer whose stride is at most 16, or the first: stage 3, as the papers' pictures."""
    fine = [call for call in calls if max(call.map_grid.stride) <= STRIDE]
    return fine[-1] if fine else calls[0]


def _edge(largest: float) -> dict[str, Any]:
    """Outline of circles, thin enough for small ones."""
    return dict(edgecolors="black", linewidths=min(0.3, 0.02 * largest))

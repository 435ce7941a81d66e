"""Pictures of what a detector's deformable layers sample: a figure for each kind of layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from ..detections import Place
from ..recording import ConvolutionCall
from ..scene import Scene
from .attention import attention_panel, choose_attention
from .canvas import Panel, assemble, rounded
from .convolutions import choose_stack, convolution_panel
from .keys import choose_keys, keys_panel
from .roi_pooling import choose_pooling, roi_pooling_panel

__all__ = ["Look", "Row", "draw", "panels_of"]

DEPTH = 3


@dataclass(frozen=True)
class Look:
    """What to show of the layers that were recorded.

    Attributes:
        chosen: Whether the recorded layers were chosen by name; otherwise those are shown that tell
            most: see the ``choose_`` functions of the kinds.
        depth: Deformable convolutions to look through. Default: 3, or as many as there are.
        group: Deform group of convolutions, group of DAT's keys. Default: 0 of convolutions, all of
            keys.
        head: Head of attention. Default: all.
    """

    chosen: bool = False
    depth: int | None = None
    group: int | None = None
    head: int | None = None

    def __post_init__(self) -> None:
        if self.depth is not None and self.depth < 1:
            raise ValueError(f"depth must be at least 1, but got {self.depth}")


@dataclass(frozen=True)
class Row:
    """One row of a figure: an image, or one layer's part of it.

    Attributes:
        scene: What the detector made of the image.
        places: What each panel after the first looks at.
        panels: The first gives an overview.
    """

    scene: Scene
    places: Sequence[Place]
    panels: Sequence[Panel]

    @property
    def layers(self) -> list[str]:
        """Names of the layers that it shows."""
        names = []
        for panel in self.panels[1:]:
            names += getattr(panel, "layers", None) or [panel.layer]
        return list(dict.fromkeys(names))

    def numbers(self) -> dict[str, Any]:
        """What it shows, for JSON."""
        panels = []
        for place, panel in zip(self.places, self.panels[1:], strict=True):
            box = None if place.box is None else rounded(place.box)
            where = dict(name=place.name, position=rounded(place.position), box=box)
            panels.append(dict(title=panel.title, place=where, **panel.numbers()))
        picture = self.scene.picture
        return dict(
            image=str(picture.path),
            size=list(picture.size),
            **self.panels[0].numbers(),
            panels=panels,
        )


def panels_of(
    kind: str,
    scene: Scene,
    places: Sequence[Place],
    overview: Panel,
    look: Look = Look(),
    objects: Sequence[Place] | None = None,
) -> list[Row]:
    """Rows of panels of one kind of layers for one image.

    Args:
        kind: One of :data:`mmdeform.analysis.recording.KINDS`.
        scene: The image and what a detector made of it.
        places: What to look at, a panel each.
        overview: The first panel of each row.
        look: What to show.
        objects: What to look at where layers have RoIs or object queries. Default: ``places``.

    Raises:
        ValueError: No layer of this kind ran, or it has not what is asked for.
    """
    calls = scene.calls(kind)
    objects = places if objects is None else objects
    if kind == "convolution":
        stack = _stack(calls, look)
        panels = [convolution_panel(scene, stack, place, look.group or 0) for place in places]
        return [Row(scene, places, [overview, *panels])]
    if kind == "roi_pooling":
        calls = calls if look.chosen else choose_pooling(calls)
        panels = [roi_pooling_panel(scene, calls, place) for place in objects]
        return [Row(scene, objects, [overview, *panels])]
    rows = []
    if kind == "attention":
        for call in _last(calls) if look.chosen else choose_attention(calls):
            where = places if call.is_encoder else objects
            panels = [attention_panel(scene, call, place, look.head) for place in where]
            rows.append(Row(scene, where, [overview, *panels]))
        return rows
    for call in _last(calls) if look.chosen else [choose_keys(calls)]:
        panels = [
            keys_panel(scene.picture, call, place.position, place.name, look.head, look.group)
            for place in places
        ]
        rows.append(Row(scene, places, [overview, *panels]))
    return rows


def draw(rows: Sequence[Row]) -> Figure:
    """The figure of rows of one kind."""
    return assemble([row.panels for row in rows])


def _stack(calls: Sequence[ConvolutionCall], look: Look) -> list[ConvolutionCall]:
    """The layers to look through."""
    depth = DEPTH if look.depth is None else look.depth
    if not look.chosen:
        return choose_stack(calls, depth)
    layers = _last(calls)
    if look.depth is not None and look.depth > len(layers):
        names = ", ".join(call.name for call in layers)
        raise ValueError(
            f"depth must be between 1 and the number of chosen convolutions, {len(layers)}, but "
            f"got {look.depth}; chosen: {names}"
        )
    return layers[-depth:]


def _last(calls: Sequence[Any]) -> list[Any]:
    """The last call of each layer, in the order in which they ran."""
    last = {call.name: call for call in calls}
    return [call for call in calls if call is last[call.name]]

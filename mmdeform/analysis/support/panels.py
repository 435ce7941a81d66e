"""The analyses of a node, each with a panel of a picture, numbers and arrays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ..detectors import Picture
from . import drawing
from .choosing import Choice
from .detections import OUTPUTS, query_outputs
from .gradients import Progress, effective_receptive_field, output_gradients
from .saliency import saliency_region
from .sampling import LocationGradient, effective_sampling
from .summary import field_summary, layer_summary, share_within, strongest_samples

__all__ = ["ANALYSES", "NothingSampled", "Options", "SupportReport"]


@dataclass(frozen=True)
class Options:
    """Settings of the analyses.

    Attributes:
        layers: Patterns of names of the layers whose samples are shown.
        samples: How many samples are drawn at most, those with the largest gradients.
        projections: Backward passes of erf and sampling.
        bound: Error of the saliency region.
        cell: Size of its cells, pixels of what the network gets; None: a 24th of the image.
        passes: Images that may go through the network for it.
        batch: How many at a time.
    """

    layers: Sequence[str] = ("**",)
    samples: int = 2000
    projections: int = 16
    bound: float = 0.1
    cell: int | None = None
    passes: int = 1000
    batch: int = 8


@dataclass
class SupportReport:
    """What is known of a node.

    Attributes:
        picture: The image.
        panels: Title of each panel, and what draws it on an axis.
        outputs: The same of the outputs of a query, which stand in a row of their own.
        numbers: For JSON: of each kind of analysis its numbers.
        arrays: Maps and points by name; positions in pixels of what the network gets.
    """

    picture: Picture
    panels: list[tuple[str, Callable[[Axes], None]]] = field(default_factory=list)
    outputs: list[tuple[str, Callable[[Axes], None]]] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def draw(self) -> Figure:
        """The picture."""
        return drawing.make_figure(
            self.picture, [row for row in (self.panels, self.outputs) if row]
        )


class NothingSampled(ValueError):
    """No deformable layer runs before a node."""


def _erf(
    report: SupportReport, choice: Choice, options: Options, progress: Progress, marked: Callable
) -> None:
    map = effective_receptive_field(choice.node, choice.images, options.projections, progress)
    map = _without_padding(map, choice)
    report.numbers["erf"] = _numbers_of(map, choice, report.picture)
    report.arrays["erf"] = map.cpu().numpy()
    report.panels.append(
        (
            "effective receptive field",
            marked(lambda axis: drawing.draw_field(axis, report.picture, report.arrays["erf"])),
        )
    )


def _sampling(
    report: SupportReport, choice: Choice, options: Options, progress: Progress, marked: Callable
) -> None:
    layers = effective_sampling(
        choice.node, choice.images, options.layers, options.projections, progress
    )
    if not layers:
        raise NothingSampled(
            f"no deformable layer that {', '.join(options.layers)} selects runs before the node, "
            f"{choice.node.name}"
        )
    picture = report.picture
    summaries = [layer_summary(layer) for layer in layers]
    for summary in summaries:
        if summary["center"] is not None:
            summary["center"] = picture.from_inputs(summary["center"]).tolist()
            summary["radius"] /= _scale(picture)
    numbers = report.numbers["sampling"] = dict(layers=summaries)
    if choice.node.box is not None:
        numbers["share_in_box"] = _share_in_box(layers, choice.node.box)
    # A bin stands for many samples: with others in one panel it would outshine them.
    for name, are_bins in (("samples", False), ("bins", True)):
        chosen = [layer for layer in layers if (layer.call.kind == "roi_pooling") == are_bins]
        if chosen:
            numbers[name] = _draw_strongest(report, chosen, options.samples, name, marked)


def _draw_strongest(
    report: SupportReport,
    layers: Sequence[LocationGradient],
    count: int,
    name: str,
    marked: Callable,
) -> dict[str, Any]:
    """A panel of the samples or bins with the largest gradients, and their numbers."""
    picture = report.picture
    points, norms, calls = strongest_samples(layers, count)
    arrays = {"points": points, "gradients": norms, "calls": calls}
    report.arrays |= {f"{name}_{key}": array.cpu().numpy() for key, array in arrays.items()}
    places = picture.from_inputs(points).tolist()

    def draw(axis: Axes) -> None:
        drawing.draw_samples(
            axis, picture, points.cpu().numpy(), norms.cpu().numpy(), name == "bins"
        )

    names = list(dict.fromkeys(layer.call.name for layer in layers))
    where = names[0] if len(names) == 1 else f"{len(names)} layers"
    report.panels.append((f"effective {name}: {len(points)} strongest of {where}", marked(draw)))
    top = zip(places[:10], norms[:10].tolist(), calls[:10].tolist(), strict=True)
    return dict(
        drawn=len(points),
        strongest=[
            dict(position=place, gradient=norm, layer=layers[call].call.name)
            for place, norm, call in top
        ],
    )


def _share_in_box(layers: Sequence[LocationGradient], box: Sequence[float]) -> float:
    """Share of the sum of all norms that belongs to samples inside a box."""
    inside = total = 0.0
    for layer in layers:
        x, y = (layer.call.locations + 0.5).unbind(-1)
        within = (x > box[0]) & (x < box[2]) & (y > box[1]) & (y < box[3])
        inside += float(layer.norms[within].double().sum())
        total += float(layer.norms.double().sum())
    return inside / total if total else 0.0


def _saliency(
    report: SupportReport, choice: Choice, options: Options, progress: Progress, marked: Callable
) -> None:
    cell = options.cell or max(4, round(max(choice.size) / 24 / 4) * 4)
    region = saliency_region(
        choice.node, choice.images, choice.size, options.bound, cell, options.passes,
        options.batch, progress,
    )  # fmt: skip
    mask = _without_padding(region.mask, choice)
    numbers = dict(
        share_of_image=region.share,
        error=region.error,
        bound=region.bound,
        cell_in_network_pixels=region.cell,
        images_through_the_network=region.passes,
        complete=region.complete,
    )
    if choice.node.box is not None:
        numbers["share_in_box"] = share_within(mask, choice.node.box)
    report.numbers["saliency"] = numbers
    report.arrays["saliency"] = mask.cpu().numpy()
    title = f"saliency region: {region.share:.0%} of the image, error {region.error:.3f}"
    if not region.complete:
        title += " (stopped early)"
    report.panels.append(
        (
            title,
            marked(
                lambda axis: drawing.draw_region(axis, report.picture, report.arrays["saliency"])
            ),
        )
    )


def _detr(
    report: SupportReport, choice: Choice, options: Options, progress: Progress, marked: Callable
) -> None:
    if choice.query is None:
        raise ValueError(f"detr needs a query of a detection transformer, got {choice.node.name}")
    node = query_outputs(
        choice.node.model, choice.sample, choice.images, choice.query, choice.label
    )
    maps = output_gradients(node, choice.images, progress)
    report.numbers["detr"] = {}
    for name, map in zip(OUTPUTS, maps, strict=True):
        map = _without_padding(map, choice)
        report.numbers["detr"][name] = _numbers_of(map, choice, report.picture)
        report.arrays[f"detr_{name}"] = map.cpu().numpy()

        def draw(axis: Axes, name: str = name) -> None:
            drawing.draw_field(axis, report.picture, report.arrays[f"detr_{name}"])

        report.outputs.append((f"gradient of {name}", marked(draw)))


def _without_padding(map: Tensor, choice: Choice) -> Tensor:
    height, width = choice.size
    return map[:height, :width]


def _numbers_of(map: Tensor, choice: Choice, picture: Picture) -> dict[str, Any]:
    """Of a map of gradients, in pixels of the image."""
    numbers = field_summary(map)
    if numbers["center"] is not None:
        numbers["center"] = picture.from_inputs(numbers["center"]).tolist()
        for name in ("radius", "side_of_half", "side_of_95_percent"):
            numbers[name] /= _scale(picture)
    if choice.node.box is not None:
        numbers["share_in_box"] = share_within(map, choice.node.box)
    return numbers


def _scale(picture: Picture) -> float:
    """Size of what the network gets relative to the image, mean of both directions."""
    return (picture.scale[0] * picture.scale[1]) ** 0.5


def box_in_image(picture: Picture, box: Sequence[float]) -> list[float]:
    return [side / picture.scale[axis % 2] for axis, side in enumerate(box)]


# By kind, in the order of the panels.
ANALYSES = dict(erf=_erf, sampling=_sampling, saliency=_saliency, detr=_detr)

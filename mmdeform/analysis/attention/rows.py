"""Rows of a picture: the same object or pixel, as the queries of one or more detectors see it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .panels import Panel, Row, make_panels
from .sparsity import negative_entropy
from .views import ImageView, Prediction

__all__ = ["Subject", "detection_rows", "position_rows"]


@dataclass(frozen=True)
class Subject:
    """A detector that looked at the image.

    Attributes:
        name: For titles, if there are several.
        view: What it saw.
        scale: (x, y) size of the image that it got relative to the image.
        classes: Names of its classes.
    """

    name: str
    view: ImageView
    scale: tuple[float, float]
    classes: tuple[str, ...]


def detection_rows(
    subjects: Sequence[Subject], count: int, heads: Sequence[int] = ()
) -> tuple[list[Row], list[dict[str, Any]]]:
    """What decoder queries attend to, in the last layer, for the best detections.

    Args:
        subjects: Detectors. Detections are those of the first; of the others the queries that
            detect the same objects best.
        count: Number of detections.
        heads: See :func:`make_panels`.

    Returns:
        Rows, and for each its numbers as JSON takes them.

    Raises:
        ValueError: The detectors have different classes, or :func:`make_panels` refuses.
    """
    first = subjects[0]
    for subject in subjects:
        if subject.classes != first.classes:
            raise ValueError(
                f"detectors to compare must have the same classes, got {', '.join(first.classes)} "
                f"and {', '.join(subject.classes)}"
            )
    rows, reports = [], []
    for found in first.view.best_predictions(count):
        box = _divide(found.box, first.scale)
        title = f"{first.classes[found.label]} {found.score:.2f}"
        panels: list[Panel] = []
        report: dict[str, Any] = {"object": first.classes[found.label], "box": box, "queries": []}
        for subject in subjects:
            same = found
            if subject is not first:
                same = subject.view.prediction_at(_times(box, subject.scale), found.label)
            layer = subject.view.last_layer("decoder cross")
            panels += _panels(subjects, subject, layer, same.query, heads, same)
            report["queries"].append(
                _numbers(subject, layer, same.query) | _detection(subject, same)
            )
        rows.append(Row(title, panels, box=box))
        reports.append(report)
    return rows, reports


def position_rows(
    subjects: Sequence[Subject],
    positions: Sequence[tuple[float, float]],
    level: int = 0,
    heads: Sequence[int] = (),
) -> tuple[list[Row], list[dict[str, Any]]]:
    """What encoder queries attend to, in the last layer, for positions in the image.

    Args:
        subjects: Detectors.
        positions: (x, y) in pixels of the image, from the edge of the first one.
        level: Of the map whose pixels are the queries, from the finest; of a detector with fewer
            maps its coarsest one.
        heads: See :func:`make_panels`.

    Returns:
        Rows, and for each its numbers as JSON takes them.

    Raises:
        ValueError: A position or level does not exist, or :func:`make_panels` refuses.
    """
    rows, reports = [], []
    for position in positions:
        panels: list[Panel] = []
        report: dict[str, Any] = {"position": list(position), "queries": []}
        for subject in subjects:
            view = subject.view
            own_level = min(level, len(view.map_sizes) - 1) if len(subjects) > 1 else level
            query = view.pixel_query(*_times(position, subject.scale), own_level)
            layer = view.last_layer("encoder self")
            panels += _panels(subjects, subject, layer, query, heads)
            report["queries"].append(_numbers(subject, layer, query) | {"level": own_level})
        rows.append(Row(f"pixel ({position[0]:g}, {position[1]:g})", panels, point=position))
        reports.append(report)
    return rows, reports


def _panels(
    subjects: Sequence[Subject],
    subject: Subject,
    layer: str,
    query: int,
    heads: Sequence[int],
    found: Prediction | None = None,
) -> list[Panel]:
    """Titles tell which of several detectors it is, and what it finds."""
    title, box = subject.name if len(subjects) > 1 else "", None
    if found:
        box = _divide(found.box, subject.scale)
        if title:
            title += f": {subject.classes[found.label]} {found.score:.2f}"
    title = f"{title}\n" if title else ""
    return make_panels(subject.view, layer, query, subject.scale, heads, title, box)


def _detection(subject: Subject, found: Prediction) -> dict[str, Any]:
    return {
        "class": subject.classes[found.label],
        "score": round(found.score, 4),
        "box": _divide(found.box, subject.scale),
    }


def _numbers(subject: Subject, layer: str, query: int) -> dict[str, Any]:
    """Attention of a query: its entropy, and its map or its samples."""
    view = subject.view
    attention = view.attentions[layer]
    weights = attention.weights(torch.tensor([query]))[0, :, 0]
    attention_map = view.attention_map(layer, query)
    report = {
        "detector": subject.name,
        "layer": layer,
        "kind": attention.kind,
        "query": query,
        "keys": attention.keys,
        "negative_entropy_of_heads": _rounded(negative_entropy(weights)),
        "map": {
            "cell_width_height": _divide(attention_map.cell, subject.scale),
            "mean_of_heads": _rounded(attention_map.weights.mean(0)),
        },
    }
    if attention.sampling is not None:
        samples = view.samples(layer, query)
        points = samples.in_input(view.size).cpu().numpy() / subject.scale
        report["samples_of_heads"] = {
            "x_y": np.round(points, 2).tolist(),
            "weights": _rounded(samples.weights),
        }
    return report


def _rounded(values: torch.Tensor) -> list:
    return np.round(values.cpu().double().numpy(), 6).tolist()


def _divide(pairs: Sequence[float], scale: tuple[float, float]) -> list[float]:
    """(x, y, ...) of the network's input as those of the image."""
    return [round(value / scale[i % 2], 3) for i, value in enumerate(pairs)]


def _times(pairs: Sequence[float], scale: tuple[float, float]) -> list[float]:
    return [value * scale[i % 2] for i, value in enumerate(pairs)]

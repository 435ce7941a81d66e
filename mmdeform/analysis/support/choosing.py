"""Finds the node of a detector that somebody asks for by a position, a detection or a query."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..detectors import Picture, preprocess
from .detections import detector_run, is_transformer, query_node, query_of, roi_node
from .nodes import Node, feature_node

__all__ = ["Choice", "choose_detection", "choose_feature", "choose_query"]


@dataclass(frozen=True)
class Choice:
    """A node of a detector for one image.

    Attributes:
        node: The node.
        images: The image as the network gets it, shape (1, C, H, W), padded.
        sample: Its data sample.
        query: Index of the query where the node is one; otherwise None.
        label: Class of the detection, if one was chosen.
        detection: The detection: ``index``, ``class``, ``score`` and ``box``, (x1, y1, x2, y2) in
            pixels of the picture; None without one.
    """

    node: Node
    images: Tensor
    sample: Any
    query: int | None = None
    label: int | None = None
    detection: dict[str, Any] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image within ``images``, without padding."""
        return tuple(self.sample.img_shape[:2])


def choose_feature(
    model: nn.Module, picture: Picture, x: float, y: float, layer: str = "backbone", index: int = -1
) -> Choice:
    """The pixel of a feature map at a position.

    Args:
        model: A detector of mmdet, in evaluation mode.
        picture: The image.
        x, y: Position in the picture, pixels.
        layer, index: See :func:`feature_node`. Default: the last map of the backbone.

    Raises:
        ValueError: The position is outside of the picture, or there is no such map.
    """
    width, height = picture.size
    if not (0 <= x <= width - 1 and 0 <= y <= height - 1):
        raise ValueError(
            f"the position must lie in the image, which is {width} pixels wide and {height} high, "
            f"got ({x:g}, {y:g})"
        )
    images, (sample,) = preprocess(model, picture)
    at = picture.to_inputs((x, y))
    run = detector_run(model, sample)
    node = feature_node(model, images, layer, float(at[0]), float(at[1]), index, run)
    return Choice(node, images, sample)


def choose_query(model: nn.Module, picture: Picture, query: int) -> Choice:
    """A query of a detection transformer.

    Args:
        model, picture: As of :func:`choose_feature`.
        query: Its index.

    Raises:
        ValueError: The detector has no such query.
    """
    images, (sample,) = preprocess(model, picture)
    return Choice(query_node(model, sample, images, query), images, sample, query)


def choose_detection(model: nn.Module, picture: Picture, index: int = 0) -> Choice:
    """What a detection comes from: its query, or the features of its box.

    Args:
        model, picture: As of :func:`choose_feature`.
        index: Which detection, from 0, the best first. Default: 0.

    Raises:
        ValueError: There is no such detection, or the detector has neither queries nor RoIs.
    """
    images, (sample,) = preprocess(model, picture)
    if not is_transformer(model) and not hasattr(model, "roi_head"):
        raise ValueError(
            f"detections of {type(model).__name__} come from no single query or box; choose a "
            "pixel of a feature map by its position"
        )
    with torch.no_grad():
        (result,) = model.test_step(picture.batch)
    found = result.pred_instances
    order = found.scores.argsort(descending=True, stable=True)
    if not 0 <= index < len(order):
        raise ValueError(
            f"detection must be from 0 to {len(order) - 1}, got {index}"
            if len(order)
            else f"{type(model).__name__} detects nothing in {picture.path}"
        )
    chosen = found[order[index : index + 1]]
    box, label = chosen.bboxes[0].tolist(), int(chosen.labels[0])
    classes = (model.dataset_meta or {}).get("classes") or ()
    name = classes[label] if label < len(classes) else str(label)
    detection = {"index": index, "class": name, "score": float(chosen.scores[0]), "box": box}
    inner = [side * picture.scale[axis % 2] for axis, side in enumerate(box)]
    if is_transformer(model):
        query = query_of(model, sample, images, inner, label)
        node = query_node(model, sample, images, query)
        return Choice(node, images, sample, query, label, detection)
    return Choice(roi_node(model, sample, inner), images, sample, label=label, detection=detection)

"""What a detector finds in an image, and places worth looking at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from mmdet.structures import DetDataSample

__all__ = [
    "Detection",
    "Place",
    "annotated_places",
    "background_place",
    "detections_of",
    "innermost",
    "largest_objects",
    "nearest_box",
    "place_of_query",
]


@dataclass(frozen=True)
class Detection:
    """One detected object.

    Attributes:
        name: Its class.
        label: Index of its class.
        score: Its score.
        box: (x1, y1, x2, y2) in pixels of the image, where pixel i reaches from i to i + 1.
        mask: Its pixels, shape (H, W), bool; those of the box if the detector makes no masks.
        has_mask: Whether the detector made the mask.
    """

    name: str
    label: int
    score: float
    box: np.ndarray
    mask: np.ndarray
    has_mask: bool


@dataclass(frozen=True)
class Place:
    """Somewhere in an image to look at.

    Attributes:
        name: What is there.
        position: (x, y) in pixels of the image, whose pixel i has its centre at i.
        box: Box (x1, y1, x2, y2) of the object there, as in :class:`Detection`, or None.
        label: Index of its class, or None.
        query: Index of an object query, or None.
    """

    name: str
    position: tuple[float, float]
    box: np.ndarray | None = None
    label: int | None = None
    query: int | None = None

    @classmethod
    def of(cls, detection: Detection) -> "Place":
        """The place of a detected object: where its mask is widest."""
        name = f"{detection.name} {detection.score:.2f}"
        return cls(name, innermost(detection.mask), detection.box, detection.label)


def detections_of(
    result: DetDataSample, classes: Sequence[str], least_score: float
) -> list[Detection]:
    """Detections of at least this score, best first; those without a pixel in the image left out.

    Args:
        result: What ``test_step`` of a detector returns for one image.
        classes: Names of the classes; where they are too few, the index is the name.
        least_score: From 0 to 1.
    """
    found = []
    if "pred_instances" not in result:
        return found
    instances = result.pred_instances.cpu().numpy()
    for index in np.argsort(-instances.scores, kind="stable"):
        score, box = float(instances.scores[index]), instances.bboxes[index].astype(float)
        if score < least_score:
            break
        has_mask = "masks" in instances
        mask = instances.masks[index].astype(bool) if has_mask else box_mask(result.ori_shape, box)
        if mask.any():
            label = int(instances.labels[index])
            name = classes[label] if label < len(classes) else f"class {label}"
            found.append(Detection(name, label, score, box, mask, has_mask))
    return found


def box_mask(shape: Sequence[int], box: Sequence[float]) -> np.ndarray:
    """Pixels of a box in an image of shape (H, W), bool."""
    mask = np.zeros(shape[:2], bool)
    left, top, right, bottom = np.round(box).astype(int).clip(0)
    mask[top:bottom, left:right] = True
    return mask


def innermost(mask: np.ndarray) -> tuple[int, int]:
    """The pixel (x, y) of ``mask`` (shape (H, W), bool) farthest from its border.

    Raises:
        ValueError: No pixel is set.
    """
    if not mask.any():
        raise ValueError("mask must have at least one pixel, but is empty")
    padded = np.pad(mask, 1).astype(np.uint8)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return int(x), int(y)


def largest_objects(found: Sequence[Detection], count: int) -> list[Detection]:
    """The largest detections; of those that overlap by more than half only the best.

    Args:
        found: Detections, best first.
        count: How many at most.
    """
    distinct: list[Detection] = []
    for detection in found:
        if all(_overlap(detection.box, other.box) <= 0.5 for other in distinct):
            distinct.append(detection)
    return sorted(distinct, key=lambda detection: -detection.mask.sum())[:count]


def annotated_places(info: Mapping[str, Any], classes: Sequence[str]) -> list[Place]:
    """Places of the annotated objects of an image, the largest first.

    Args:
        info: What ``get_data_info`` of an mmdet data set returns.
        classes: Names of the classes.
    """
    places = []
    for instance in info["instances"]:
        box, label = np.asarray(instance["bbox"], float), int(instance["bbox_label"])
        if not instance.get("ignore_flag"):
            x, y = box.reshape(2, 2).mean(0) - 0.5
            name = classes[label] if label < len(classes) else f"class {label}"
            places.append(Place(name, (float(x), float(y)), box, label))
    return sorted(places, key=lambda place: -(place.box[2:] - place.box[:2]).prod())


def background_place(
    size: tuple[int, int], found: Sequence[Detection], boxes: Sequence[Sequence[float]] = ()
) -> Place | None:
    """The place farthest from all objects; None where they cover the image.

    Args:
        size: (width, height) of the image.
        found: Detected objects.
        boxes: Boxes of annotated objects, as in :class:`Detection`.
    """
    background = np.ones((size[1], size[0]), bool)
    for mask in [
        *(found.mask for found in found),
        *(box_mask((size[1], size[0]), b) for b in boxes),
    ]:
        background &= ~mask
    return Place("background", innermost(background)) if background.any() else None


def place_of_query(boxes: np.ndarray | None, query: int) -> Place:
    """The place of an object query: the middle of its box.

    Args:
        boxes: Boxes of all queries, as in :class:`Detection`; None where there are none.
        query: Index.

    Raises:
        ValueError: There is no such query.
    """
    if boxes is None:
        raise ValueError("query: the detector has no object queries, as DETR-like detectors have")
    if not 0 <= query < len(boxes):
        raise ValueError(f"query must be between 0 and {len(boxes) - 1}, but got {query}")
    x, y = boxes[query].reshape(2, 2).mean(0) - 0.5
    return Place(f"query {query}", (float(x), float(y)), boxes[query], query=query)


def nearest_box(boxes: np.ndarray, box: Sequence[float]) -> int:
    """Index of the box whose sides are nearest to those of ``box``: least sum of distances.

    Args:
        boxes: (x1, y1, x2, y2), shape (B, 4).
        box: (x1, y1, x2, y2) in the same unit.

    Raises:
        ValueError: ``boxes`` is empty.
    """
    if not len(boxes):
        raise ValueError("boxes must hold at least one box, but is empty")
    return int(np.abs(np.asarray(boxes, float) - np.asarray(box, float)).sum(1).argmin())


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two boxes."""
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    shared = float(sides.clip(0).prod())
    union = float((one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod()) - shared
    return shared / union if union > 0 else 0.0

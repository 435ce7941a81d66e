"""What a detector made of one image: detections, calls of its layers, boxes of its queries."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmdet.models.dense_heads import DETRHead
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from .detections import Detection, Place, detections_of
from .detectors import Picture
from .queries import box_corners, predictions_of
from .recording import KINDS, LayerCall, Recording, record

__all__ = ["Scene", "look", "undisturbed"]


@dataclass(frozen=True)
class Scene:
    """What a detector made of one image.

    Attributes:
        picture: The image.
        result: What the detector returned.
        recording: What its deformable layers sampled.
        classes: Names of its classes.
        query_boxes: Boxes (x1, y1, x2, y2) of the object queries of a DETR-like detector in pixels
            of the image, shape (queries, 4); None for other detectors.
    """

    picture: Picture
    result: DetDataSample
    recording: Recording
    classes: tuple[str, ...]
    query_boxes: np.ndarray | None = None

    @property
    def kinds(self) -> list[str]:
        """Kinds of the layers that ran."""
        return [kind for kind in KINDS if self.recording.of_kind(kind)]

    def calls(self, kind: str) -> list[LayerCall]:
        """Calls of a family.

        Raises:
            ValueError: No layer of this family ran.
        """
        calls = self.recording.of_kind(kind)
        if not calls:
            there = ", ".join(self.kinds) or "none"
            raise ValueError(f"kind: no layer of {kind!r} ran; there are {there}")
        return calls

    def detections(self, least_score: float = 0.0) -> list[Detection]:
        """Detections of at least this score, best first."""
        return detections_of(self.result, self.classes, least_score)

    def box_in_inputs(self, box: Sequence[float]) -> np.ndarray:
        """A box (x1, y1, x2, y2) of the image in pixels of what the network gets."""
        return (np.asarray(box, float).reshape(2, 2) * self.picture.scale).ravel()

    def box_from_inputs(self, box: Sequence[float]) -> np.ndarray:
        """The reverse of :meth:`box_in_inputs`."""
        return (np.asarray(box, float).reshape(2, 2) / self.picture.scale).ravel()

    def check(self, place: Place) -> None:
        """Raises a ValueError if the position of a place is not in the image."""
        (x, y), (width, height) = place.position, self.picture.size
        if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
            raise ValueError(
                f"position must lie in {self.picture.path.name}, which is {width} pixels wide and "
                f"{height} high, but got {x:g} {y:g}"
            )


def look(
    model: nn.Module,
    picture: Picture,
    layers: str | Sequence[str] = "**",
    classes: Sequence[str] | None = None,
) -> Scene:
    """Runs a detector on an image as its test does, and remembers what its layers sampled.

    The detector stays as it was, training or not, and so do all random numbers.

    Args:
        model: A detector; see :func:`mmdeform.analysis.detectors.load_detector`.
        picture: The image; see :func:`mmdeform.analysis.detectors.load_picture`.
        layers: A pattern or several of the layers to record, as in
            :func:`mmdeform.analysis.recording.record`. Default: all.
        classes: Names of the classes. Default: those of the detector's ``dataset_meta``.

    Raises:
        ValueError: The model has no deformable layer, or a pattern matches none.
    """
    boxes: list[Tensor] = []
    with undisturbed(model), record(model, layers) as recording, _query_boxes(model, boxes):
        (result,) = model.test_step(picture.batch)
    if classes is None:
        classes = (getattr(model, "dataset_meta", None) or {}).get("classes", ())
    in_image = _in_image(boxes[-1][0], result) if boxes else None
    return Scene(picture, result, recording, tuple(classes), in_image)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards all modes and random numbers are as before."""
    training = [module for module in model.modules() if module.training]
    python, numpy = random.getstate(), np.random.get_state()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            for module in training:  # not eval(), which some detectors override
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _query_boxes(model: nn.Module, boxes: list[Tensor]) -> Iterator[None]:
    """Collects the last boxes of a DETR's head: normalised (cx, cy, w, h), (N, queries, 4)."""
    head = getattr(model, "bbox_head", None)
    if not isinstance(head, DETRHead):
        yield
        return

    def see(head: nn.Module, args: Any, output: Sequence[Any]) -> None:
        boxes.append(predictions_of(head, output)[1].detach())

    handle = head.register_forward_hook(see)
    try:
        yield
    finally:
        handle.remove()


def _in_image(boxes: Tensor, result: DetDataSample) -> np.ndarray:
    """Boxes of queries as detections have them: clipped, in pixels of the image."""
    height, width = result.img_shape[:2]
    corners = box_corners(boxes.cpu().double(), result).view(-1, 2, 2).numpy()
    corners = corners.clip(0, (width, height)) / result.get("scale_factor", (1.0, 1.0))
    return corners.reshape(-1, 4)

"""Nodes of mmdet's detectors: RoIs of two-stage detectors, queries of detection transformers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmdet.models.detectors import DetectionTransformer
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor, nn

from ..queries import box_corners, predictions_of
from .nodes import Node, Reached, centre_of, ended_by, outputs_of

__all__ = [
    "OUTPUTS",
    "detector_run",
    "is_transformer",
    "query_node",
    "query_of",
    "query_outputs",
    "roi_node",
]

OUTPUTS = ("x", "y", "w", "h", "c")  # of a query: centre, size and score


def detector_run(
    model: nn.Module, sample: DetDataSample, boxes: Tensor | None = None
) -> Callable[[Tensor], Any]:
    """How a detector is sent images that have the sizes, paddings and scales of one of them.

    Args:
        model: A detector of mmdet.
        sample: Data sample of that image, after the data preprocessor.
        boxes: RoIs of a two-stage detector in place of its proposals, (x1, y1, x2, y2) in pixels of
            what the network gets, shape (R, 4). Default: its own.
    """

    def run(images: Tensor) -> Any:
        samples = [DetDataSample(metainfo=sample.metainfo) for _ in images]
        for each in samples if boxes is not None else ():
            each.proposals = InstanceData(
                bboxes=boxes.to(images), scores=torch.ones(len(boxes), device=images.device)
            )
        return model(images, samples, mode="predict")

    return run


def is_transformer(model: nn.Module) -> bool:
    """Whether a detector is a DETR or one of its descendants."""
    return isinstance(model, DetectionTransformer)


def roi_node(model: nn.Module, sample: DetDataSample, box: Sequence[float]) -> Node:
    """The features of a box in a two-stage detector.

    Its response is what the last shared fully connected layer of the (first) box head returns,
    before the activation; of box heads without one, such as R-FCN's, the scores of the classes.

    Args:
        model: A two-stage detector of mmdet.
        sample: Data sample of the image, after the data preprocessor.
        box: (x1, y1, x2, y2) in pixels of what the network gets.

    Raises:
        ValueError: The detector has no RoI head with a box head, or the box is empty.
    """
    head = getattr(getattr(model, "roi_head", None), "bbox_head", None)
    if head is None:
        raise ValueError(f"{type(model).__name__} has no roi_head with a bbox_head, so no RoIs")
    x1, y1, x2, y2 = (float(side) for side in box)
    if not (x2 > x1 and y2 > y1):
        raise ValueError(f"box must be (x1, y1, x2, y2) with x1 < x2 and y1 < y2, got {tuple(box)}")
    head = head[0] if isinstance(head, nn.ModuleList) else head
    layers = getattr(head, "shared_fcs", ())
    module, what = (layers[-1], "shared features") if len(layers) else (head, "class scores")
    run = detector_run(model, sample, torch.tensor([[x1, y1, x2, y2]]))

    def respond(images: Tensor) -> Tensor:
        return outputs_of(run, module, images, 1)[0].flatten(1)

    return Node(f"{what} of the box", model, respond, centre_of((x1, y1, x2, y2)), (x1, y1, x2, y2))


def query_node(model: nn.Module, sample: DetDataSample, images: Tensor, query: int) -> Node:
    """The embedding of a query of a detection transformer behind the last decoder layer.

    Args:
        model: DETR or one of its descendants in mmdet.
        sample: Data sample of the image, after the data preprocessor.
        images: The image, shape (1, C, H, W); one forward pass finds the box of the query.
        query: Index of the query.

    Raises:
        ValueError: The detector has no such query.
    """
    box = _box_of(model, sample, images, query)
    run = detector_run(model, sample)

    def respond(images: Tensor) -> Tensor:
        return _hidden_states(run, model.bbox_head, images)[-1][:, query]

    return Node(f"embedding of query {query}", model, respond, centre_of(box), box)


def query_outputs(
    model: nn.Module, sample: DetDataSample, images: Tensor, query: int, label: int | None = None
) -> Node:
    """What a detection transformer predicts for a query: x, y, w, h and c.

    Its response are the centre, the width and the height of the box, as shares of the image, and
    the score of a class, a probability; see :data:`OUTPUTS`.

    Args:
        model, sample, images, query: As of :func:`query_node`.
        label: Index of the class. Default: the one with the highest score.
    """
    box = _box_of(model, sample, images, query)
    run = detector_run(model, sample)
    with torch.no_grad():
        scores = _predict(run, model.bbox_head, images)[0][0, query]
    if label is None:
        label = int(scores.argmax())
    if not 0 <= label < len(scores):
        raise ValueError(f"label must be from 0 to {len(scores) - 1}, got {label}")

    def respond(images: Tensor) -> Tensor:
        scores, boxes = _predict(run, model.bbox_head, images)
        return torch.cat([boxes[:, query], scores[:, query, label, None]], 1)

    name = f"box and score of class {label} of query {query}"
    return Node(name, model, respond, centre_of(box), box)


def query_of(
    model: nn.Module, sample: DetDataSample, images: Tensor, box: Sequence[float], label: int
) -> int:
    """Which query predicted a detection.

    Args:
        model, sample, images: As of :func:`query_node`.
        box: Of the detection, (x1, y1, x2, y2) in pixels of what the network gets.
        label: Its class.

    Returns:
        The query with the nearest box; of several equal ones the one with the highest score.
    """
    with torch.no_grad():
        scores, boxes = _predict(detector_run(model, sample), model.bbox_head, images)
    distance = (box_corners(boxes[0], sample) - boxes.new_tensor(list(box))).abs().amax(-1)
    near = distance <= distance.min() + 1e-2  # of a pixel: detections went through the scale
    return int(torch.where(near, scores[0, :, label], -1).argmax())


def _box_of(
    model: nn.Module, sample: DetDataSample, images: Tensor, query: int
) -> tuple[float, float, float, float]:
    if not is_transformer(model):
        raise ValueError(f"{type(model).__name__} is no detection transformer: it has no queries")
    with torch.no_grad():
        _, boxes = _predict(detector_run(model, sample), model.bbox_head, images)
    if not 0 <= query < boxes.shape[1]:
        raise ValueError(f"query must be from 0 to {boxes.shape[1] - 1}, got {query}")
    return tuple(box_corners(boxes[0, query], sample).tolist())


def _predict(run: Callable, head: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of the classes (N, Lq, classes) and boxes (N, Lq, 4), of the last layer."""
    found: list[Any] = []

    def see(module: nn.Module, args: tuple, output: Any) -> None:
        found.extend(output[:2])
        raise Reached

    with ended_by(head.register_forward_hook(see)):
        run(images)
    return predictions_of(head, found)


def _hidden_states(run: Callable, head: nn.Module, images: Tensor) -> Tensor:
    """Embeddings of the queries behind each decoder layer, (layers, N, Lq, C)."""
    found: list[Tensor] = []

    def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise Reached

    with ended_by(head.register_forward_pre_hook(see, with_kwargs=True)):
        run(images)
    return found[0]

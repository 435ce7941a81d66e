"""What the queries of a detection transformer predict."""

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models import DETRHead
from mmdet.structures import DetDataSample
from torch import Tensor

__all__ = ["box_corners", "predictions_of"]


def predictions_of(head: DETRHead, outputs: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Scores and boxes behind the last decoder layer.

    Args:
        head: The head of mmdet's DETR or of one of its descendants.
        outputs: What it returned: logits and boxes of all layers, and maybe more.

    Returns:
        Probabilities of the classes, shape (N, Lq, classes), and boxes (x, y, w, h) with their
        centres, as shares of the image without its padding, shape (N, Lq, 4).
    """
    logits, boxes = outputs[0][-1], outputs[1][-1]
    if head.loss_cls.use_sigmoid:
        return logits.sigmoid(), boxes
    return logits.softmax(-1)[..., :-1], boxes  # the last class is 'no object'


def box_corners(boxes: Tensor, sample: DetDataSample) -> Tensor:
    """Boxes as (x1, y1, x2, y2) in pixels of what the network got.

    Args:
        boxes: As :func:`predictions_of` returns them, shape (..., 4).
        sample: Data sample of the image, which knows its size, ``img_shape``.
    """
    height, width = sample.img_shape[:2]
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    corners = torch.cat([center - half, center + half], -1)
    return corners * corners.new_tensor([width, height, width, height])

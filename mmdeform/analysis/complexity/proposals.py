"""How many boxes the RoI heads of two-stage detectors get."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .exchange import exchanged
from .inputs import is_detector

__all__ = ["count_rois", "fixed_proposals", "proposals_of"]


def proposals_of(model: nn.Module) -> int | None:
    """How many proposals a two-stage detector keeps at most; None without an RPN for its RoIs."""
    if not is_detector(model) or not getattr(model, "with_roi_head", False):
        return None
    from mmdet.models.dense_heads import RPNHead

    head = getattr(model, "rpn_head", None)
    # Other heads, such as that of Sparse R-CNN, propose a fixed number by themselves.
    return head.test_cfg.max_per_img if isinstance(head, RPNHead) else None


@contextmanager
def fixed_proposals(model: nn.Module, count: int) -> Iterator[None]:
    """Gives the RoI heads of a two-stage detector ``count`` boxes while the block runs.

    The RPN computes its maps; its boxes, of which untrained weights leave an arbitrary number
    after NMS, are replaced by boxes of all sizes all over the image.

    Args:
        model: A detector for which :func:`proposals_of` is not None.
        count: Boxes per image.

    Raises:
        ValueError: ``model`` has no RPN for its RoIs, or ``count`` is less than one.
    """
    if proposals_of(model) is None:
        raise ValueError(f"{type(model).__name__} has no RPN whose proposals could be replaced")
    if count < 1:
        raise ValueError(f"proposals: expected at least one, got {count}")
    predict = partial(_propose, model.rpn_head, count)
    with exchanged(model.rpn_head, "predict", predict):
        yield


@contextmanager
def count_rois(model: nn.Module) -> Iterator[dict[str, int]]:
    """Counts, while the block runs, the RoIs for which mmdet's extractors pool features.

    Yields:
        Number of RoIs, of all images and calls, by the name of the extractor.
    """
    counts: dict[str, int] = {}
    if not is_detector(model):
        yield counts
        return
    from mmdet.models.roi_heads.roi_extractors import BaseRoIExtractor

    def see(name: str, _: nn.Module, args: tuple, kwargs: dict) -> None:
        rois = args[1] if len(args) > 1 else kwargs["rois"]
        counts[name] = counts.get(name, 0) + len(rois)

    hooks = [
        module.register_forward_pre_hook(partial(see, name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, BaseRoIExtractor)
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def _propose(head: nn.Module, count: int, maps: Any, data_samples: Any, **_: Any) -> list[Any]:
    from mmengine.structures import InstanceData

    head(maps)
    device = maps[0].device
    return [
        InstanceData(
            bboxes=_boxes(count, sample.img_shape).to(device),
            scores=torch.linspace(1, 0.5, count, device=device),
            labels=torch.zeros(count, dtype=torch.long, device=device),
        )
        for sample in data_samples
    ]


def _boxes(count: int, shape: tuple[int, int]) -> Tensor:
    """Boxes (x1, y1, x2, y2) within (height, width), edges from 16 pixels to the image's."""
    size = torch.tensor(shape[::-1], dtype=torch.float)
    place, scale = torch.rand(2, count, 2, generator=torch.Generator().manual_seed(0))
    least = size.clamp(max=16)
    edges = least * (size / least) ** scale
    corner = place * (size - edges)
    return torch.cat([corner, corner + edges], 1)

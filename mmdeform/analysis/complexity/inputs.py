"""What a model of a config is called with to see what it costs."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import nn

__all__ = ["Inputs", "config_shape", "is_detector", "make_inputs"]


@dataclass(frozen=True)
class Inputs:
    """Arguments of a forward pass over one image of noise.

    Attributes:
        args, kwargs: For the model.
        image_shape: (height, width) of the image, pixels.
        network_shape: The same after the model's own padding.
    """

    args: tuple
    kwargs: dict[str, Any]
    image_shape: tuple[int, int]
    network_shape: tuple[int, int]


def config_shape(cfg: Mapping[str, Any]) -> tuple[int, int]:
    """The size of images in a config's test pipeline: of its last resize, crop or padding.

    A size that images only have to fit into, such as mmdet's (1333, 800), is taken as it stands:
    width and height of a landscape that fills it.

    Args:
        cfg: A config, mmengine's order (width, height) in its pipeline.

    Returns:
        (height, width), pixels.

    Raises:
        ValueError: There is no pipeline, or none of its steps gives a size.
    """
    pipeline = _test_pipeline(cfg)
    for step in reversed(pipeline):
        for key in ("size", "crop_size", "scale"):
            size = step.get(key)
            if isinstance(size, int):
                return size, size
            if isinstance(size, (tuple, list)) and all(isinstance(n, int) for n in size):
                width, height = size
                return height, width
    names = ", ".join(str(step.get("type")) for step in pipeline) or "none"
    raise ValueError(
        f"the config tells no size of test images (steps of its test pipeline: {names}); give one"
    )


def _test_pipeline(cfg: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    dataset = (cfg.get("test_dataloader") or {}).get("dataset") or {}
    while "pipeline" not in dataset and isinstance(dataset.get("dataset"), Mapping):
        dataset = dataset["dataset"]  # within a wrapper
    return list(dataset.get("pipeline") or cfg.get("test_pipeline") or [])


def make_inputs(
    model: nn.Module,
    shape: tuple[int, int],
    device: torch.device | str = "cpu",
    mode: str = "tensor",
) -> Inputs:
    """Noise for a model: through its data preprocessor for OpenMMLab's models, else as it is.

    Args:
        model: A detector, a classifier, or any module that maps (N, 3, H, W).
        shape: (height, width) of the image, pixels.
        device: Of the model.
        mode: ``"tensor"``: the network alone; ``"predict"``: with what comes after it, for
            OpenMMLab's models.

    Returns:
        What to call ``model`` with.

    Raises:
        ValueError: ``mode`` is unknown, or is ``"predict"`` for a plain module.
    """
    if mode not in ("tensor", "predict"):
        raise ValueError(f"mode: expected 'tensor' or 'predict', got {mode!r}")
    noise = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    if not isinstance(model, BaseModel):
        if mode == "predict":
            raise ValueError(
                f"mode: {type(model).__name__} is a plain module and has 'tensor' alone"
            )
        return Inputs(((noise * 2 - 1)[None].to(device),), {}, shape, shape)
    image = (noise * 255).to(device)
    data = model.data_preprocessor(dict(inputs=[image], data_samples=_data_samples(model, shape)))
    return Inputs(
        (data["inputs"],),
        dict(data_samples=data["data_samples"], mode=mode),
        shape,
        tuple(data["inputs"].shape[2:]),
    )


def _data_samples(model: nn.Module, shape: tuple[int, int]) -> list[Any] | None:
    if not is_detector(model):
        return None
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    metainfo = dict(img_id=0, img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0))
    # Sparse R-CNN looks for annotations even in mode 'tensor'.
    nothing = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    return [DetDataSample(metainfo=metainfo, gt_instances=nothing)]


def is_detector(model: nn.Module) -> bool:
    """Whether a model is one of mmdet's detectors."""
    if importlib.util.find_spec("mmdet") is None:
        return False
    from mmdet.models.detectors import BaseDetector

    return isinstance(model, BaseDetector)

"""Detectors, and images as they see them, from configs."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine import Config
from mmengine.registry import init_default_scope
from torch import nn

from mmdeform.registry import MODELS

__all__ = ["build_detector", "class_names", "first_samples", "image_sample"]


def build_detector(
    config: Path, options: Mapping[str, Any] | None = None, device: str = "cpu"
) -> nn.Module:
    """The detector of a config in evaluation mode, with weights as they are before training.

    Args:
        config: File.
        options: Changes of the config, by dotted names.
        device: Where to put it.

    Returns:
        The detector, with its config as ``cfg``.

    Raises:
        ValueError: The config has no model.
    """
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(dict(options or {}))
    if not cfg.get("model"):
        raise ValueError(f"{config} has no model")
    init_default_scope(cfg.get("default_scope", "mmdet"))
    model = MODELS.build(copy.deepcopy(cfg.model)).to(device)
    model.eval()  # mmdet's ResNet returns nothing
    model.cfg = cfg
    return model


def first_samples(cfg: Config, data: str, count: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The first images of a data set with their data samples, and the names of their files.

    Args:
        cfg: Config of a detector.
        data: 'val' or 'test'.
        count: Number of images.

    Raises:
        ValueError: There is no such data set, or it has less images.
        FileNotFoundError: Its files are missing.
    """
    from mmdet.registry import DATASETS

    loader = cfg.get(f"{data}_dataloader")
    if not loader:
        raise ValueError(f"{cfg.filename} has no {data}_dataloader")
    dataset = DATASETS.build(loader.dataset)
    if not 1 <= count <= len(dataset):
        raise ValueError(
            f"the number of images must be between 1 and {len(dataset)}, all that the {data} set "
            f"has, but got {count}"
        )
    names = [str(dataset.get_data_info(index)["img_path"]) for index in range(count)]
    return [dataset[index] for index in range(count)], names


def image_sample(cfg: Config, path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """An image, shape (H, W, 3), RGB, and what the test pipeline of a detector makes of it.

    Raises:
        ValueError: The file is no image, or the config has no test pipeline.
    """
    from mmcv.transforms import Compose
    from mmdet.utils import get_test_pipeline_cfg

    if not cfg.get("test_dataloader"):
        raise ValueError(f"{cfg.filename} has no test_dataloader with a pipeline for images")
    image = cv2.imread(str(path))
    if image is None:
        raise ValueError(f"{path} is no image that OpenCV can read")
    return image[..., ::-1], Compose(get_test_pipeline_cfg(cfg))(dict(img_path=str(path), img_id=0))


def class_names(cfg: Config) -> tuple[str, ...]:
    """Names of the classes, as the test set of a config has them; its files are not needed."""
    from mmdet.registry import DATASETS

    return tuple(
        DATASETS.build({**cfg.test_dataloader.dataset, "lazy_init": True}).metainfo["classes"]
    )

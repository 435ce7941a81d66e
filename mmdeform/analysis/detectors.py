"""Detectors and images for looking into them: loaded strictly, with positions that map back."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmcv.transforms import Compose
from mmdet.registry import DATASETS, MODELS
from mmdet.utils import get_test_pipeline_cfg
from mmengine import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

__all__ = [
    "Picture",
    "build_dataset",
    "build_detector",
    "load_detector",
    "load_picture",
    "picture_of",
    "preprocess",
]


def load_detector(
    config: str | os.PathLike | Config,
    checkpoint: str | os.PathLike | None = None,
    device: str | torch.device = "cpu",
    cfg_options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Builds a detector in evaluation mode, with all its weights from a checkpoint.

    Other than ``mmdet.apis.init_detector`` it refuses a checkpoint that lacks weights of the model.

    Args:
        config: Config of an mmdet detector, or its path.
        checkpoint: Path or address of its checkpoint. Default: None, which leaves the weights as
            they are initialised.
        device: Where to put it. Default: the CPU.
        cfg_options: Changes of the config, as ``--cfg-options`` gives them. Default: None.

    Returns:
        The detector, with the config as ``cfg`` and the data set's ``dataset_meta``.

    Raises:
        ValueError: The config has no model, or the checkpoint is no checkpoint of it.
    """
    model = build_detector(config, "cpu", cfg_options)
    if checkpoint is None:
        model.init_weights()
        model.eval()  # some models set modes there
    else:
        meta = _load_strictly(model, checkpoint).get("dataset_meta")
        model.dataset_meta = meta or model.dataset_meta
    return model.to(device)


def build_detector(
    config: str | os.PathLike | Config,
    device: str | torch.device = "cpu",
    cfg_options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Builds a detector in evaluation mode; weights are as its constructors leave them.

    Args and Returns: as of :func:`load_detector`.

    Raises:
        ValueError: The config has no model.
    """
    cfg = config if isinstance(config, Config) else Config.fromfile(config)
    if cfg_options:
        cfg.merge_from_dict(dict(cfg_options))
    if cfg.get("model") is None:
        raise ValueError(f"{cfg.filename} has no model")
    init_default_scope(cfg.get("default_scope", "mmdet"))
    model = MODELS.build(cfg.model)
    model.cfg = cfg
    dataset = (cfg.get("val_dataloader") or {}).get("dataset", {})
    model.dataset_meta = dict(dataset.get("metainfo") or {})
    model.to(device)
    model.eval()  # of some models it returns None
    return model


def _load_strictly(model: nn.Module, checkpoint: str | os.PathLike) -> dict[str, Any]:
    """Fills a model; returns the checkpoint's ``meta``."""
    try:
        loaded = CheckpointLoader.load_checkpoint(
            str(checkpoint), map_location="cpu", logger="silent"
        )
    except Exception as error:  # unpickling a damaged file may raise anything
        raise ValueError(f"{checkpoint} cannot be read as a checkpoint: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{checkpoint} holds {type(loaded).__name__}, expected a checkpoint")
    state = loaded.get("state_dict", loaded)
    try:
        missing = model.load_state_dict(state, strict=False).missing_keys
    except RuntimeError as error:  # other shapes
        raise ValueError(f"{checkpoint} does not fit {type(model).__name__}: {error}") from error
    if missing:
        raise ValueError(
            f"{checkpoint} lacks {len(missing)} of the weights of {type(model).__name__}, "
            f"{missing[0]} first: is it a checkpoint of this config?"
        )
    return loaded.get("meta") or {}


@dataclass(frozen=True)
class Picture:
    """An image, and what the test pipeline of a detector makes of it.

    Positions are (x, y) in pixels whose pixel i has its centre at i.

    Attributes:
        path: Its file.
        pixels: The image, shape (H, W, 3), RGB, uint8.
        batch: What ``model.test_step`` takes: ``inputs`` and ``data_samples``, of one image.
        scale: (x, y) size of the resized image relative to ``pixels``. Padding comes after
            resizing, right and below, and does not change it.
    """

    path: Path
    pixels: np.ndarray
    batch: dict[str, Any]
    scale: tuple[float, float]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of ``pixels``."""
        return self.pixels.shape[1], self.pixels.shape[0]

    def to_inputs(self, points: Any) -> np.ndarray:
        """Positions in the image as positions in what the network gets, shape (..., 2)."""
        return (np.asarray(points, float) + 0.5) * self.scale - 0.5

    def from_inputs(self, points: Any) -> np.ndarray:
        """Positions in what the network gets as positions in the image, shape (..., 2)."""
        if isinstance(points, Tensor):
            points = points.detach().cpu().numpy()
        return (np.asarray(points, float) + 0.5) / self.scale - 0.5


def load_picture(model: nn.Module | Config, path: str | os.PathLike) -> Picture:
    """Reads an image and sends it through the test pipeline of a detector.

    Args:
        model: What :func:`load_detector` or mmdet's ``init_detector`` returns, or its config.
        path: Image file.

    Raises:
        ValueError: The file is no image, or the config has no test pipeline.
    """
    cfg = model if isinstance(model, Config) else model.cfg
    if not cfg.get("test_dataloader"):
        raise ValueError(f"{cfg.filename} has no test_dataloader with a pipeline for images")
    pixels = _pixels(path)
    data = Compose(get_test_pipeline_cfg(cfg))(dict(img_path=str(path), img_id=0))
    return _picture(path, pixels, data)


def picture_of(dataset: Any, index: int) -> Picture:
    """An image of a data set, and what the data set's own pipeline makes of it.

    Args:
        dataset: A data set of mmdet for validation or test.
        index: Which image.

    Raises:
        ValueError: The file is no image.
    """
    path = dataset.get_data_info(index)["img_path"]
    return _picture(path, _pixels(path), dataset[index])


def _pixels(path: str | os.PathLike) -> np.ndarray:
    image = cv2.imread(str(path))
    if image is None:
        raise ValueError(f"{path} is no image that OpenCV can read")
    return image[..., ::-1].copy()


def _picture(path: str | os.PathLike, pixels: np.ndarray, data: dict[str, Any]) -> Picture:
    scale = data["data_samples"].metainfo.get("scale_factor", (1.0, 1.0))
    batch = pseudo_collate([data])
    return Picture(Path(path), pixels, batch, (float(scale[0]), float(scale[1])))


def preprocess(model: nn.Module, picture: Picture) -> tuple[Tensor, list]:
    """What the detector itself is called with: images (1, C, H, W), padded, and data samples."""
    with torch.no_grad():
        data = model.data_preprocessor(picture.batch, False)
    return data["inputs"], data["data_samples"]


def build_dataset(cfg: Config, split: str = "val") -> Any:
    """The data set of a config.

    Args:
        cfg: Config of a detector.
        split: 'train', 'val' or 'test'. Default: 'val'.

    Raises:
        ValueError: The config has no such data set, or its files are not there.
    """
    loader = cfg.get(f"{split}_dataloader")
    if not loader:
        raise ValueError(f"{cfg.filename} has no {split}_dataloader")
    init_default_scope(cfg.get("default_scope", "mmdet"))
    try:
        return DATASETS.build(loader.dataset)
    except FileNotFoundError as error:
        raise ValueError(f"the data set of {split}_dataloader is not there: {error}") from error

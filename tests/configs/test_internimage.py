"""The configs of InternImage and FlashInternImage: published settings and sizes."""

import copy
import functools
import re
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet")
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope

from mmdeform import typed_attention
from mmdeform.layers import DCNv3, DCNv4, LN2d, MultiScaleDeformableAttention

CONFIGS = Path(__file__).parents[2] / "configs"
PATHS = sorted(
    path
    for folder in ("internimage", "flash_internimage")
    for path in (CONFIGS / folder).glob("*_coco.py")
)


class Published(NamedTuple):
    """What a config of the authors says."""

    drop_path_rate: float
    images: tuple[int, int]  # per GPU, and in a batch
    lr: float
    decay_rate: float
    parameters: float  # of the detector, in millions


# By backbone, size, and schedule or detector.
PUBLISHED = {
    ("internimage", "t", "1x"): Published(0.2, (2, 16), 1e-4, 1.0, 0),
    ("internimage", "s", "1x"): Published(0.3, (2, 16), 1e-4, 1.0, 0),
    ("internimage", "b", "1x"): Published(0.4, (2, 16), 1e-4, 1.0, 0),
    ("internimage", "t", "3x"): Published(0.2, (2, 16), 1e-4, 1.0, 0),
    ("internimage", "s", "3x"): Published(0.3, (2, 16), 1e-4, 1.0, 0),
    ("internimage", "b", "3x"): Published(0.4, (2, 16), 1e-4, 1.0, 0),
    ("internimage", "t", "dino"): Published(0.2, (2, 16), 1e-4, 0.9, 0),
    ("flash-internimage", "t", "1x"): Published(0.2, (2, 16), 1e-4, 1.0, 0),
    ("flash-internimage", "s", "1x"): Published(0.3, (2, 16), 1e-4, 1.0, 0),
    ("flash-internimage", "b", "1x"): Published(0.3, (2, 16), 1e-4, 1.0, 0),
    ("flash-internimage", "t", "3x"): Published(0.2, (2, 64), 1e-4, 1.0, 0),
    ("flash-internimage", "s", "3x"): Published(0.4, (8, 64), 2e-4, 1.0, 0),
    ("flash-internimage", "b", "3x"): Published(0.4, (4, 64), 2e-4, 0.9, 0),
    ("flash-internimage", "t", "dino"): Published(0.2, (4, 32), 2e-4, 0.9, 0),
    ("flash-internimage", "s", "dino"): Published(0.3, (4, 32), 2e-4, 0.9, 0),
    ("flash-internimage", "b", "dino"): Published(0.3, (4, 32), 2e-4, 0.9, 0),
}
TYPES = {"internimage": "mmdeform.InternImage", "flash-internimage": "mmdeform.FlashInternImage"}
SIZES = {"t": ("tiny", 64, 30), "s": ("small", 80, 33), "b": ("base", 112, 33)}
PRETRAINED = {
    "internimage": "https://huggingface.co/OpenGVLab/InternImage/resolve/main/internimage_{}_1k_224.pth",
    "flash-internimage": "https://huggingface.co/OpenGVLab/DCNv4/resolve/main/flash_intern_image_{}_1k_224.pth",
}

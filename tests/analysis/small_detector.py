"""A small detector on disk, with a checkpoint and a data set of one image, for tests of tools."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine import Config

from mmdeform.analysis.detectors import load_detector

from ..models.small_retinanet import RULE, retinanet

PIPELINE = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(200, 120), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("ori_shape", "img_shape", "scale_factor")),
]
BOXES = [[30, 10, 30, 30], [2, 30, 12, 12]]  # x, y, width, height


def write_config(folder: Path, **changes: Any) -> Path:
    """A RetinaNet with DCNv2 that makes 180 x 120 of its image of 75 x 50, padded to 192 x 128."""
    model = retinanet()
    model["test_cfg"]["max_per_img"] = 20
    model["data_preprocessor"] = dict(type="DetDataPreprocessor", pad_size_divisor=32)
    model = dict(model, type="mmdeform.Transplant", model="RetinaNet", rules=[RULE])
    annotations = [
        dict(id=i, image_id=1, category_id=1, bbox=box, area=box[2] * box[3], iscrowd=0)
        for i, box in enumerate(BOXES)
    ]
    images = [dict(id=1, file_name="image.png", width=75, height=50)]
    categories = [dict(id=1, name="disc")]
    (folder / "val.json").write_text(
        json.dumps(dict(images=images, annotations=annotations, categories=categories))
    )
    rng = np.random.default_rng(0)
    cv2.imwrite(str(folder / "image.png"), rng.integers(0, 255, (50, 75, 3), np.uint8))
    dataset = dict(
        type="CocoDataset",
        data_root=str(folder),
        ann_file="val.json",
        data_prefix=dict(img=""),
        metainfo=dict(classes=("disc",)),
        test_mode=True,
        pipeline=PIPELINE,
    )
    loader = dict(dataset=dataset)
    cfg = dict(default_scope="mmdet", model=model, val_dataloader=loader, test_dataloader=loader)
    Config(cfg | changes).dump(folder / "config.py")
    return folder / "config.py"


def write_checkpoint(config: Path) -> Path:
    torch.manual_seed(5)
    path = config.parent / "epoch_1.pth"
    meta = dict(dataset_meta=dict(classes=("disc", "ring", "pair")))
    torch.save(dict(state_dict=load_detector(config).state_dict(), meta=meta), path)
    return path

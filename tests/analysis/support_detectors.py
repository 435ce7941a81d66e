"""Small detectors for tests of spatial support, with their configs and checkpoints."""

import copy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmdet.testing import demo_mm_inputs
from mmengine import Config
from torch import nn

from mmdeform.analysis.detectors import load_detector

from ..models.small_retinanet import RULE, retinanet

MODELS = Path(__file__).parents[2] / "configs" / "_base_" / "models"
SIZE = (75, 50)  # width, height; resized to 90 x 60 and padded to 96 x 64
PIPELINE = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(96, 60), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("ori_shape", "img_shape", "scale_factor")),
]


def detector_config(kind: str) -> Config:
    """Of a deformable "faster" R-CNN, an "rfcn", a "transformer" or a detector of "one" stage."""
    if kind == "one":  # a one-stage detector
        model = dict(retinanet(), type="mmdeform.Transplant", model="RetinaNet", rules=[RULE])
        cfg = Config(dict(model=model))
        cfg.model.test_cfg.max_per_img = 20
    elif kind == "transformer":
        cfg = Config.fromfile(MODELS / "deformable-detr_r50-small.py")
        cfg.model.update(num_queries=10, with_box_refine=False)
        cfg.model.backbone.update(depth=18, base_channels=8, stem_channels=8)
        cfg.model.neck.in_channels = [16, 32, 64]
        cfg.model.encoder.num_layers, cfg.model.decoder.num_layers = 1, 2
    else:
        cfg = Config.fromfile(MODELS / f"{kind}{'-rcnn' * (kind == 'faster')}_r50-small.py")
        cfg.model.backbone.update(base_channels=4, stem_channels=8)
        if kind == "faster":
            cfg.model.backbone.update(
                dcn=dict(type="mmdeform.DCNv2", deform_groups=1, fallback_on_stride=False),
                stage_with_dcn=(False, False, True, True),
            )
            cfg.model.neck.in_channels = [16, 32, 64, 128]
            extractor = cfg.model.roi_head.bbox_roi_extractor
            extractor.type = "mmdeform.SingleRoIExtractor"
            extractor.roi_layer = dict(
                type="mmdeform.ModulatedDeformRoIPoolPack",
                output_size=7,
                output_channels=64,
                deform_fc_channels=16,
            )
        else:
            cfg.model.neck.in_channels = 128
            cfg.model.rpn_head.in_channels = 64
            cfg.model.roi_head.bbox_head.roi_layer.type = "mmdeform.DeformPSRoIPoolPack"
        cfg.model.train_cfg.rpn_proposal.update(nms_pre=50, max_per_img=20)
        cfg.model.test_cfg.rpn.update(nms_pre=50, max_per_img=20)
        cfg.model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=20)
    cfg.default_scope = "mmdet"
    pipeline = dict(dataset=dict(pipeline=PIPELINE))
    cfg.update(test_dataloader=pipeline, custom_imports=dict(imports=["mmdeform"]))
    cfg.model.data_preprocessor.pad_size_divisor = 32
    return cfg


def trained(cfg: Config, steps: int = 2) -> nn.Module:
    """A detector after some steps of training on random images, with offsets that are not zero."""
    torch.manual_seed(0)
    model = load_detector(cfg).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for seed in range(steps):
        torch.manual_seed(seed)
        data = demo_mm_inputs(2, [(3, 64, 96)] * 2, num_items=[2, 3], num_classes=3)
        data = model.data_preprocessor(data, training=True)
        losses = model(**data, mode="loss")
        loss, _ = model.parse_losses(losses)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for name, parameter in model.named_parameters():
        if not parameter.any() or "sampling_offsets.weight" in name:
            nn.init.normal_(parameter, std=0.05)
    model.dataset_meta = dict(classes=("disc", "ring", "pair"))
    return model.eval()


def write_image(path: Path) -> Path:
    """Noise with a bright rectangle."""
    pixels = np.random.default_rng(0).integers(0, 90, (SIZE[1], SIZE[0], 3))
    pixels[15:35, 30:55] += 120
    cv2.imwrite(str(path), pixels.astype(np.uint8))
    return path


def write(folder: Path, kind: str) -> dict[str, Any]:
    """Writes config, checkpoint and image; returns their paths."""
    cfg = detector_config(kind)
    model = trained(copy.deepcopy(cfg))
    paths = dict(
        config=folder / f"{kind}.py",
        checkpoint=folder / f"{kind}.pth",
        image=write_image(folder / "image.png"),
    )
    cfg.dump(paths["config"])
    meta = dict(dataset_meta=model.dataset_meta)
    torch.save(dict(state_dict=model.state_dict(), meta=meta), paths["checkpoint"])
    return paths

"""Two small detectors that have layers of every kind between them, and images for them."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch import nn

from ..models.small_retinanet import RULE

WIDTH, HEIGHT = 96, 64
BOXES = [[8, 10, 30, 40], [50, 20, 30, 30], [2, 50, 12, 12]]  # COCO's x, y, w, h
PIPELINE = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(WIDTH * 2, HEIGHT * 2), keep_ratio=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
CLASSES = ("disc", "ring")
PREPROCESSOR = dict(type="DetDataPreprocessor", mean=[128.0] * 3, std=[64.0] * 3)


def two_stage() -> dict[str, Any]:
    """Faster R-CNN with deformable convolutions in c4 and c5, and modulated RoI pooling."""
    box = dict(type="DeltaXYWHBBoxCoder")
    nms = dict(type="nms", iou_threshold=0.5)
    assigner = dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0)
    sampler = dict(
        type="RandomSampler", num=16, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=False
    )
    stage = dict(assigner=assigner, sampler=sampler, pos_weight=-1, debug=False, allowed_border=-1)
    detector = dict(
        type="FasterRCNN",
        data_preprocessor=PREPROCESSOR,
        backbone=dict(type="ResNet", depth=18, base_channels=8, stem_channels=8),
        neck=dict(type="FPN", in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5),
        rpn_head=dict(
            type="RPNHead",
            in_channels=8,
            feat_channels=8,
            anchor_generator=dict(
                type="AnchorGenerator", scales=[8], ratios=[1.0], strides=[4, 8, 16, 32, 64]
            ),
            bbox_coder=box,
        ),
        roi_head=dict(
            type="StandardRoIHead",
            bbox_roi_extractor=dict(
                type="mmdeform.SingleRoIExtractor",
                roi_layer=dict(
                    type="mmdeform.ModulatedDeformRoIPoolPack", output_size=3, output_channels=8,
                    deform_fc_channels=8,
                ),
                out_channels=8,
                featmap_strides=[4, 8],
            ),
            bbox_head=dict(
                type="Shared2FCBBoxHead", in_channels=8, fc_out_channels=8, roi_feat_size=3,
                num_classes=len(CLASSES), bbox_coder=box,
            ),
        ),
        train_cfg=dict(
            rpn=stage,
            rpn_proposal=dict(nms_pre=20, max_per_img=20, nms=nms, min_bbox_size=0),
            rcnn=stage,
        ),
        test_cfg=dict(
            rpn=dict(nms_pre=20, max_per_img=20, nms=nms, min_bbox_size=0),
            rcnn=dict(score_thr=0.0, nms=nms, max_per_img=20),
        ),
    )  # fmt: skip
    return dict(detector, type="mmdeform.Transplant", model=detector["type"], rules=[RULE])


def detr() -> dict[str, Any]:
    """Deformable DETR on a DAT whose third stage has deformable attention."""
    attention = dict(embed_dims=16, num_heads=2, num_levels=2, dropout=0.0)
    layer = dict(ffn_cfg=dict(embed_dims=16, feedforward_channels=16, ffn_drop=0.0))
    return dict(
        type="mmdeform.DeformableDETR",
        num_queries=12,
        num_feature_levels=2,
        as_two_stage=False,
        with_box_refine=True,
        data_preprocessor=PREPROCESSOR,
        backbone=dict(
            type="mmdeform.DAT", img_size=64, stem_dims=8, dims=(8, 8, 16, 16),
            num_heads=(1, 1, 2, 2), num_groups=(1, 1, 2, 2), stage_specs=("L", "L", "DL", "L"),
            out_indices=(2, 3), drop_path_rate=0.0,
        ),
        neck=dict(
            type="ChannelMapper", in_channels=[16, 16], kernel_size=1, out_channels=16,
            norm_cfg=dict(type="GN", num_groups=4), num_outs=2, act_cfg=None,
        ),
        encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=dict(attention), **layer)),
        decoder=dict(
            num_layers=2,
            return_intermediate=True,
            post_norm_cfg=None,
            layer_cfg=dict(
                self_attn_cfg=dict(embed_dims=16, num_heads=2, dropout=0.0),
                cross_attn_cfg=dict(attention),
                **layer,
            ),
        ),
        positional_encoding=dict(num_feats=8, normalize=True, offset=-0.5),
        bbox_head=dict(
            type="DeformableDETRHead",
            num_classes=len(CLASSES),
            embed_dims=16,
            loss_cls=dict(type="FocalLoss", use_sigmoid=True),
        ),
        train_cfg=dict(
            assigner=dict(
                type="HungarianAssigner",
                match_costs=[
                    dict(type="FocalLossCost", weight=2.0),
                    dict(type="BBoxL1Cost", weight=5.0, box_format="xywh"),
                ],
            )
        ),
        test_cfg=dict(max_per_img=8),
    )  # fmt: skip


DETECTORS = {"two_stage": two_stage, "detr": detr}
KINDS = {"two_stage": ["convolution", "roi_pooling"], "detr": ["attention", "keys"]}


def write_data(folder: Path, images: int = 3) -> dict[str, Any]:
    """Config of a data set; its first image has no object."""
    random = np.random.default_rng(0)
    infos, annotations = [], []
    for index in range(images):
        name = f"{index}.png"
        pixels = random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / name), pixels)
        infos.append(dict(id=index + 1, file_name=name, width=WIDTH, height=HEIGHT))
        for label, box in enumerate(BOXES if index else []):
            annotations.append(
                dict(
                    id=len(annotations) + 1, image_id=index + 1, bbox=box, area=box[2] * box[3],
                    category_id=label % 2 + 1, iscrowd=0,
                )
            )  # fmt: skip
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)]
    (folder / "val.json").write_text(
        json.dumps(dict(images=infos, annotations=annotations, categories=categories))
    )
    return dict(
        type="CocoDataset",
        data_root=str(folder),
        ann_file="val.json",
        data_prefix=dict(img=""),
        metainfo=dict(classes=CLASSES),
        test_mode=True,
        pipeline=PIPELINE,
        serialize_data=False,  # which collects garbage
    )


def config_of(model: dict[str, Any], dataset: dict[str, Any]) -> dict[str, Any]:
    """Settings of a config with a model and a data set."""
    loader = dict(dataset=dataset)
    return dict(default_scope="mmdet", model=model, val_dataloader=loader, test_dataloader=loader)


def move(model: nn.Module) -> None:
    """Gives everything that predicts offsets, and the heads, random weights."""
    for name, parameter in model.named_parameters():
        offsets = ("offset", "mask_fc", "sampling_offsets", "attention_weights", "reg_branches")
        if any(word in name for word in offsets):
            nn.init.normal_(parameter, std=0.3)

"""A small RetinaNet for tests of replaced layers, and what they do with it."""

from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from torch import nn

from mmdeform.models import Transplant

RULE = dict(select="backbone.layer[34].*.conv2", type="mmdeform.DCNv2", deform_groups=2)
REPLACED = [f"backbone.layer{i}.{j}.conv2" for i in (3, 4) for j in (0, 1)]


def retinanet(**backbone: Any) -> dict:
    """A small RetinaNet on a ResNet-18."""
    return dict(
        type="RetinaNet",
        data_preprocessor=dict(type="DetDataPreprocessor"),
        backbone=dict(type="ResNet", depth=18, base_channels=8, stem_channels=8, **backbone),
        neck=dict(type="FPN", in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5),
        bbox_head=dict(
            type="RetinaHead", num_classes=3, in_channels=8, feat_channels=8, stacked_convs=1
        ),
        train_cfg=dict(
            assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0),
            sampler=dict(type="PseudoSampler"),
            allowed_border=-1,
            pos_weight=-1,
            debug=False,
        ),
        test_cfg=dict(nms_pre=20, score_thr=0.0, nms=dict(type="nms", iou_threshold=0.5)),
    )


def build(cfg: dict, *rules: dict) -> nn.Module:
    """A detector with the same constructors' random numbers every time."""
    init_default_scope("mmdet")
    torch.manual_seed(0)
    if rules:
        cfg = dict(type="mmdeform.Transplant", model=cfg, rules=rules)
    return MODELS.build(cfg)


def init(detector: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    detector.init_weights()
    return detector


def transplant(detector: nn.Module, *rules: dict) -> nn.Module:
    init_default_scope("mmdet")
    return Transplant(detector, rules=rules)


def conv(*args: Any, **kwargs: Any) -> nn.Module:
    """A model whose only module is a convolution."""
    return nn.ModuleDict(dict(conv=nn.Conv2d(*args, **kwargs)))


def assert_initialised_like(detector: nn.Module, plain: nn.Module, kind: type | None) -> None:
    """Everything that both have is equal; layers of ``kind`` start with offsets of zero."""
    values = detector.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(values[name], value), name
    for name in REPLACED if kind else []:
        layer = detector.get_submodule(name)
        assert type(layer) is kind
        assert not any(parameter.any() for parameter in layer.conv_offset.parameters())

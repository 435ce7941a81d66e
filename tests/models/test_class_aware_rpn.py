"""The RPN that tells classes apart, as a detector of one stage."""

import pytest
import torch

pytest.importorskip("mmdet")
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch import nn

from mmdeform.models import ClassAwareRPNHead

CLASSES, STRIDE = 4, 16
ANCHORS = dict(type="AnchorGenerator", scales=[1, 2], ratios=[0.5, 1.0, 2.0], strides=[STRIDE])
TRAIN = dict(
    assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3),
    sampler=dict(type="RandomSampler", num=16, pos_fraction=0.5, add_gt_as_proposals=False),
    allowed_border=-1,
    pos_weight=-1,
)
TEST = dict(nms_pre=1000, score_thr=0.3, nms=dict(type="nms", iou_threshold=0.3), max_per_img=10)
META = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), (64, 80))
META["scale_factor"] = (1.0, 1.0)


@pytest.fixture(autouse=True)
def mmdet_scope() -> None:
    init_default_scope("mmdet")


def make_head(**options) -> ClassAwareRPNHead:
    config = dict(
        type="mmdeform.ClassAwareRPNHead",
        num_classes=CLASSES,
        in_channels=5,
        feat_channels=7,
        anchor_generator=ANCHORS,
        train_cfg=TRAIN,
        test_cfg=TEST,
    )
    head = MODELS.build(ConfigDict(config, **options))
    assert type(head) is ClassAwareRPNHead
    return head


def test_one_convolution_then_classes_and_boxes_of_each_anchor() -> None:
    head = make_head()
    shapes = {name: tuple(parameter.shape) for name, parameter in head.named_parameters()}
    assert shapes == {
        "rpn_conv.weight": (7, 5, 3, 3),
        "rpn_conv.bias": (7,),
        "rpn_cls.weight": (6 * (CLASSES + 1), 7, 1, 1),
        "rpn_cls.bias": (6 * (CLASSES + 1),),
        "rpn_reg.weight": (24, 7, 1, 1),
        "rpn_reg.bias": (24,),
    }
    x = torch.randn(2, 5, 4, 6)
    (scores,), (boxes,) = head([x])
    hidden = nn.functional.conv2d(x, head.rpn_conv.weight, head.rpn_conv.bias, padding=1).clamp(0)
    for got, conv in ((scores, head.rpn_cls), (boxes, head.rpn_reg)):
        expected = torch.einsum("nchw,oc->nohw", hidden, conv.weight[:, :, 0, 0])
        torch.testing.assert_close(got, expected + conv.bias[:, None, None])
    assert ClassAwareRPNHead(CLASSES, 5).rpn_conv.out_channels == 512


def test_scores_may_be_independent() -> None:
    head = make_head(loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=True))
    assert head.rpn_cls.out_channels == 6 * CLASSES


@pytest.mark.parametrize("sigmoid", [False, True])
def test_an_anchor_learns_the_class_of_its_object(sigmoid: bool) -> None:
    head = make_head(loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=sigmoid))
    # The square anchor of scale 2, number 3 of 6, at the centre of column 2 and row 1.
    instances = InstanceData(
        bboxes=torch.tensor([[16.0, 0.0, 48.0, 32.0]]), labels=torch.tensor([2])
    )
    sample = DetDataSample(metainfo=META, gt_instances=instances)
    feats = [torch.randn(1, 5, 4, 5)]
    losses = head.loss(feats, [sample])
    assert losses.keys() == {"loss_cls", "loss_bbox"}
    scores = torch.zeros(1, 6 * head.cls_out_channels, 4, 5, requires_grad=True)
    boxes = torch.zeros(1, 24, 4, 5, requires_grad=True)
    losses = head.loss_by_feat([scores], [boxes], [instances], [META])
    (losses["loss_cls"][0] + losses["loss_bbox"][0]).backward()
    gradient = scores.grad.view(6, head.cls_out_channels, 4, 5)
    assert torch.equal((gradient[:, 2] < 0).nonzero(), torch.tensor([[3, 1, 2]]))
    assert not (gradient[:, :2] < 0).any() and not (gradient[:, 3:CLASSES] < 0).any()
    learned = gradient.abs().sum(1) > 0
    assert learned.sum() == 16  # of 120
    if not sigmoid:
        assert (gradient[:, CLASSES] < 0).sum() == 15  # the background
        torch.testing.assert_close(gradient.sum(1), torch.zeros(6, 4, 5))


def test_detections_of_several_classes() -> None:
    head = make_head()
    scores = torch.zeros(1, 6, CLASSES + 1, 4, 5)
    scores[:, :, CLASSES] = 9.0  # the background everywhere
    scores[0, 3, 2, 1, 2] = 20.0
    scores[0, 3, 3, 1, 2] = 20.0  # another class at the same place survives
    scores[0, 2, 0, 3, 4] = 20.0
    boxes = torch.zeros(1, 24, 4, 5)
    boxes[0, 4 * 3, 1, 2] = 0.25  # dx of the first: 8 pixels
    (result,) = head.predict_by_feat([scores.flatten(1, 2)], [boxes], batch_img_metas=[META])
    found = {
        (label, *box)
        for label, box in zip(result.labels.tolist(), result.bboxes.tolist(), strict=True)
    }
    assert found == {(2, 24, 0, 56, 32), (3, 24, 0, 56, 32), (0, 56, 40, 72, 56)}
    assert sorted(result.scores.tolist()) == pytest.approx([0.5, 0.5, 1.0], abs=1e-3)


def test_detector_learns_everything() -> None:
    model = MODELS.build(
        ConfigDict(
            type="SingleStageDetector",
            backbone=dict(
                type="ResNet",
                depth=50,
                base_channels=4,
                stem_channels=4,
                strides=(1, 2, 2, 1),
                dilations=(1, 1, 1, 2),
                out_indices=(3,),
            ),
            neck=dict(type="mmdeform.TopReduction", in_channels=128, out_channels=5),
            bbox_head=dict(
                type="mmdeform.ClassAwareRPNHead",
                num_classes=CLASSES,
                in_channels=5,
                feat_channels=7,
                anchor_generator=ANCHORS,
            ),
            train_cfg=TRAIN,
            test_cfg=dict(TEST, score_thr=0.0),
        )
    )
    model.init_weights()
    assert model.bbox_head.rpn_cls.weight.std().item() == pytest.approx(0.01, rel=0.3)
    instances = InstanceData(
        bboxes=torch.tensor([[16.0, 0.0, 48.0, 32.0]]), labels=torch.tensor([2])
    )
    sample = DetDataSample(metainfo=META, gt_instances=instances)
    images = torch.randn(1, 3, 64, 80)
    losses = model.loss(images, [sample])
    sum(sum(value) for value in losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(parameter.grad.any() for parameter in model.bbox_head.parameters())
    model.eval()
    with torch.no_grad():
        (result,) = model.predict(images, [sample])
    assert 0 < len(result.pred_instances.bboxes) <= 10

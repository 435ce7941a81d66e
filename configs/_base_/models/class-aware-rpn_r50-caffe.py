# The RPN of R-FCN as a detector of its own: it tells classes apart and reads the reduced c5.
_base_ = "mmdet::_base_/models/faster-rcnn_r50-caffe-dc5.py"
model = dict(
    _delete_=True,
    type="SingleStageDetector",
    data_preprocessor=_base_.model.data_preprocessor,
    backbone=_base_.model.backbone,
    neck=dict(type="mmdeform.TopReduction", in_channels=2048, out_channels=1024),
    bbox_head=dict(
        type="mmdeform.ClassAwareRPNHead",
        num_classes=80,
        in_channels=1024,
        feat_channels=512,
        anchor_generator=dict(
            type="AnchorGenerator", scales=[8, 16, 32], ratios=[0.5, 1.0, 2.0], strides=[16]
        ),
        loss_bbox=dict(type="SmoothL1Loss", beta=1 / 9),
    ),
    train_cfg=_base_.model.train_cfg.rpn,
    test_cfg=dict(
        nms_pre=6000,
        score_thr=0.001,
        nms=dict(type="nms", iou_threshold=0.3),
        max_per_img=100,
    ),
)

_base_ = "./rfcn_r50_shapes.py"
model = dict(
    _delete_=True,
    type="SingleStageDetector",
    data_preprocessor=_base_.model.data_preprocessor,
    backbone=dict(_base_.model.backbone, out_indices=(3,)),
    neck=_base_.model.neck,
    bbox_head=dict(
        type="mmdeform.ClassAwareRPNHead",
        num_classes=5,
        in_channels=128,
        feat_channels=64,
        anchor_generator=_base_.model.rpn_head.anchor_generator,
        loss_bbox=_base_.model.rpn_head.loss_bbox,
    ),
    train_cfg=_base_.model.train_cfg.rpn,
    test_cfg=_base_.model.test_cfg.rcnn,
)

"""A config of mmdet's, made small, with the project's data set, neck and hooks."""

_base_ = "mmdet::dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py"
custom_imports = dict(imports=["orchard"], allow_failed_imports=False)

model = dict(
    backbone=dict(base_channels=8, frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(type="AttentiveFPN", in_channels=[32, 64, 128, 256], out_channels=32),
    rpn_head=dict(in_channels=32, feat_channels=32),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=32),
        bbox_head=dict(in_channels=32, fc_out_channels=64, num_classes=2),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=50)),
    test_cfg=dict(rpn=dict(nms_pre=50)),
)

load = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(128, 128), keep_ratio=True),
]
test_keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
data = dict(type="OrchardDataset", data_root="data/", data_prefix=dict(img="images/"))
train_dataloader = dict(
    _delete_=True,
    batch_size=2,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(ann_file="train.json", pipeline=[*load, dict(type="PackDetInputs")], **data),
)
val_dataloader = dict(
    _delete_=True,
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        ann_file="val.json",
        test_mode=True,
        pipeline=[*load, dict(type="PackDetInputs", meta_keys=test_keys)],
        **data,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file="data/val.json")
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=2)
param_scheduler = [dict(type="ConstantLR", factor=1.0)]
optim_wrapper = dict(optimizer=dict(lr=0.01))
default_hooks = dict(logger=dict(interval=1))
custom_hooks = [dict(type="KernelReportHook"), dict(type="PowerCutHook")]
randomness = dict(seed=0)

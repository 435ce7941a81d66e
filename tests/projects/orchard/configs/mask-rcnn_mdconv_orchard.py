"""A config of mmdeform's with the project's data set, neck and hooks."""

_base_ = "mmdeform::dcnv2/mask-rcnn_r50-mdconv-c3-c5_shapes.py"
custom_imports = dict(imports=["orchard", "mmdeform"])

model = dict(
    neck=dict(type="AttentiveFPN"),
    roi_head=dict(bbox_head=dict(num_classes=2), mask_head=dict(num_classes=2)),
    train_cfg=dict(rpn_proposal=dict(nms_pre=50)),
    test_cfg=dict(rpn=dict(nms_pre=50)),
)
data = dict(
    type="OrchardDataset", data_root="data/", data_prefix=dict(img="images/"), metainfo=None
)
train_dataloader = dict(batch_size=2, dataset=data)
val_dataloader = dict(batch_size=1, dataset=data)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file="data/val.json")
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=1, val_interval=1)
default_hooks = dict(logger=dict(interval=1))
custom_hooks = [dict(type="KernelReportHook")]

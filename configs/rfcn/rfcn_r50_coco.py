_base_ = [
    "../_base_/models/rfcn_r50-caffe.py",
    "../_base_/datasets/coco_detection_600px.py",
    "../_base_/schedules/dcn_16e.py",
    "../_base_/coco_runtime.py",
]
model = dict(rpn_head=dict(anchor_generator=dict(scales=[4, 8, 16, 32])))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(neck=dict(lr_mult=3.0))))

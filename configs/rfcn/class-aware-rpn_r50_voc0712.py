_base_ = [
    "../_base_/models/class-aware-rpn_r50-caffe.py",
    "../_base_/datasets/voc0712_600px.py",
    "../_base_/schedules/dcn_14e.py",
    "../_base_/coco_runtime.py",
]
model = dict(bbox_head=dict(num_classes=20))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(neck=dict(lr_mult=3.0))))

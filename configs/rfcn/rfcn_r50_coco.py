_base_ = [
    "../_base_/models/rfcn_r50-caffe.py",
    "../_base_/datasets/coco_detection_600.py",
    "../_base_/schedules/sgd_16e_coco.py",
    "../_base_/coco_runtime.py",
]
model = dict(rpn_head=dict(anchor_generator=dict(scales=[4, 8, 16, 32])))

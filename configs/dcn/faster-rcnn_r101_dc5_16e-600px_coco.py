# The plain twin: RoIAlign and no deformable convolution.
_base_ = [
    "../_base_/models/faster-rcnn_r101-dc5-dcn.py",
    "../_base_/datasets/coco_detection_600px.py",
    "../_base_/schedules/dcn_16e.py",
    "../_base_/coco_runtime.py",
]
model = dict(rpn_head=dict(anchor_generator=dict(scales=[4, 8, 16, 32])))

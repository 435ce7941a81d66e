# The plain twin: RoIAlign and no deformable convolution. Objects of VOC are large: three scales.
_base_ = [
    "../_base_/models/faster-rcnn_r101-dc5-dcn.py",
    "../_base_/datasets/voc0712_600px.py",
    "../_base_/schedules/dcn_14e.py",
    "../_base_/coco_runtime.py",
]
model = dict(
    rpn_head=dict(anchor_generator=dict(scales=[8, 16, 32])),
    roi_head=dict(bbox_head=dict(num_classes=20)),
)

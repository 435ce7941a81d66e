# The plain twin: RoIAlign and no deformable convolution.
_base_ = [
    "../_base_/models/mask-rcnn_r50-dc5.py",
    "../_base_/datasets/coco_instance_1000px.py",
    "../_base_/schedules/dcnv2_16e.py",
    "../_base_/coco_runtime.py",
]

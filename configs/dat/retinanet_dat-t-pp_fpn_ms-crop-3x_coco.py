_base_ = "./retinanet_dat-t-v1_fpn_ms-crop-3x_coco.py"
model = dict(
    backbone=dict(version="pp"),
    neck=dict(in_channels=[128, 256, 512]),
)

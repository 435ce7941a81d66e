# The plain twin of the small detectors on ResNet-18.
_base_ = "./faster-rcnn_r50_shapes.py"
model = dict(backbone=dict(depth=18), neck=dict(in_channels=[16, 32, 64, 128]))

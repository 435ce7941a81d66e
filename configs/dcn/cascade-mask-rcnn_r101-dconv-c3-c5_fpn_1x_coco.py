_base_ = "./cascade-mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py"
model = dict(
    backbone=dict(depth=101, init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet101"))
)

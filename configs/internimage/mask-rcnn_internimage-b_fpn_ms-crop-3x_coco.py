_base_ = "./mask-rcnn_internimage-t_fpn_ms-crop-3x_coco.py"
pretrained = "https://huggingface.co/OpenGVLab/InternImage/resolve/main/internimage_b_1k_224.pth"
model = dict(
    backbone=dict(arch="base", drop_path_rate=0.4, init_cfg=dict(checkpoint=pretrained)),
    neck=dict(in_channels=[112, 224, 448, 896]),
)

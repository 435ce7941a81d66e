_base_ = "./mask-rcnn_flash-internimage-t_fpn_ms-crop-3x_coco.py"
pretrained = "https://huggingface.co/OpenGVLab/DCNv4/resolve/main/flash_intern_image_b_1k_224.pth"
model = dict(
    backbone=dict(arch="base", drop_path_rate=0.4, init_cfg=dict(checkpoint=pretrained)),
    neck=dict(in_channels=[112, 224, 448, 896]),
)
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(
    optimizer=dict(lr=0.0002),
    constructor="mmdeform.OffsetLrConstructor",
    paramwise_cfg=dict(
        offset=dict(conv=dict(lr_mult=0.01)),
        constructor="mmdeform.LayerDecayConstructor",
        decay_rate=0.9,
    ),
)

_base_ = "./dino-4scale_flash-internimage-t_8xb4-12e_coco.py"
pretrained = "https://huggingface.co/OpenGVLab/DCNv4/resolve/main/flash_intern_image_b_1k_224.pth"
model = dict(
    backbone=dict(arch="base", drop_path_rate=0.3, init_cfg=dict(checkpoint=pretrained)),
    neck=dict(in_channels=[224, 448, 896]),
)
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(level_embed=dict(lr_mult=_base_.decay_rate**34)))
)

_base_ = "./dino-4scale_flash-internimage-t_8xb4-12e_coco.py"
pretrained = "https://huggingface.co/OpenGVLab/DCNv4/resolve/main/flash_intern_image_s_1k_224.pth"
model = dict(
    backbone=dict(arch="small", drop_path_rate=0.3, init_cfg=dict(checkpoint=pretrained)),
    neck=dict(in_channels=[160, 320, 640]),
)
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(level_embed=dict(lr_mult=_base_.decay_rate**34)))
)

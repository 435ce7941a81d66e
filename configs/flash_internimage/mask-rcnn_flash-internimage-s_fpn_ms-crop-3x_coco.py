_base_ = "./mask-rcnn_flash-internimage-t_fpn_ms-crop-3x_coco.py"
pretrained = "https://huggingface.co/OpenGVLab/DCNv4/resolve/main/flash_intern_image_s_1k_224.pth"
model = dict(
    backbone=dict(arch="small", drop_path_rate=0.4, init_cfg=dict(checkpoint=pretrained)),
    neck=dict(in_channels=[80, 160, 320, 640]),
)
train_dataloader = dict(batch_size=8)
optim_wrapper = dict(optimizer=dict(lr=0.0002))

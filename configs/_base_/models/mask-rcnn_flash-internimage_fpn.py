_base_ = "./mask-rcnn_internimage_fpn.py"
pretrained = "https://huggingface.co/OpenGVLab/DCNv4/resolve/main/flash_intern_image_t_1k_224.pth"
model = dict(
    backbone=dict(
        type="mmdeform.FlashInternImage", with_cp=True, init_cfg=dict(checkpoint=pretrained)
    ),
    neck=dict(norm_cfg=dict(type="mmdeform.LN2d")),  # as in ViTDet, for stable training
)

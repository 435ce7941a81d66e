_base_ = "mmdet::_base_/models/mask-rcnn_r50_fpn.py"
pretrained = "https://huggingface.co/OpenGVLab/InternImage/resolve/main/internimage_t_1k_224.pth"
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmdeform.InternImage",
        arch="tiny",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint=pretrained),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

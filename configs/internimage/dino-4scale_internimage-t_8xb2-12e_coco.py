_base_ = "../dino/dino-4scale_r50_8xb2-12e_coco.py"
pretrained = "https://huggingface.co/OpenGVLab/InternImage/resolve/main/internimage_t_1k_224.pth"
model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(
        _delete_=True,
        type="mmdeform.InternImage",
        arch="tiny",
        drop_path_rate=0.2,
        out_indices=(1, 2, 3),
        with_cp=True,
        init_cfg=dict(type="Pretrained", checkpoint=pretrained),
    ),
    neck=dict(in_channels=[128, 256, 512]),
)

# The augmentation of mmdet's DINO, but no crop and no image without objects.
scales = [(short, 1333) for short in range(480, 801, 32)]
train_pipeline = [
    dict(type="LoadImageFromFile", backend_args=_base_.backend_args),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="RandomChoice",
        transforms=[
            [dict(type="RandomChoiceResize", scales=scales, keep_ratio=True)],
            [
                dict(
                    type="RandomChoiceResize",
                    scales=[(400, 4200), (500, 4200), (600, 4200)],
                    keep_ratio=True,
                ),
                dict(
                    type="RandomCrop",
                    crop_type="absolute_range",
                    crop_size=(384, 600),
                    allow_negative_crop=False,
                ),
                dict(type="RandomChoiceResize", scales=scales, keep_ratio=True),
            ],
        ],
    ),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(
    dataset=dict(filter_cfg=dict(filter_empty_gt=True), pipeline=train_pipeline)
)

decay_rate = 0.9
optim_wrapper = dict(
    constructor="mmdeform.LayerDecayConstructor",
    paramwise_cfg=dict(
        _delete_=True,
        decay_rate=decay_rate,
        custom_keys=dict(
            sampling_offsets=dict(decay_mult=0.0),
            # The authors' code takes it for a part of the stem, 31 layers away.
            level_embed=dict(lr_mult=decay_rate**31),
        ),
    ),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[11], gamma=0.1),
]

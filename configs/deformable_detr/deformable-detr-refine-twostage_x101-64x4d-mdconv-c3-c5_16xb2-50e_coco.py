# Deformable convolution in the backbone beside deformable attention.
_base_ = "./deformable-detr-refine-twostage_r50_16xb2-50e_coco.py"
model = dict(
    backbone=dict(
        type="ResNeXt",
        depth=101,
        groups=64,
        base_width=4,
        dcn=dict(type="mmdeform.DCNv2", deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
        init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://resnext101_64x4d"),
    )
)

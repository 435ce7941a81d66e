# Offsets and modulation of convolutions learn slowly, those of RoI pooling at the normal rate.
_base_ = "./mask-rcnn_r50_dc5_16e-1000px_coco.py"
roi_layer = dict(type="mmdeform.ModulatedDeformRoIPoolPack", output_channels=256, head="paper")
model = dict(
    backbone=dict(
        dcn=dict(type="mmdeform.DCNv2", deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=roi_layer), mask_roi_extractor=dict(roi_layer=roi_layer)
    ),
)
optim_wrapper = dict(
    constructor="mmdeform.OffsetLrConstructor",
    paramwise_cfg=dict(offset=dict(conv=dict(lr_mult=0.1))),
)

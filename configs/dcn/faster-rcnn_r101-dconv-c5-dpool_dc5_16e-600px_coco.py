# The layer that predicts the offsets of RoI pooling learns slowly.
_base_ = "./faster-rcnn_r101_dc5_16e-600px_coco.py"
model = dict(
    backbone=dict(
        dcn=dict(type="mmdeform.DCN", deform_groups=4, fallback_on_stride=False),
        stage_with_dcn=(False, False, False, True),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            roi_layer=dict(
                type="mmdeform.DeformRoIPoolPack",
                output_channels=256,
                sampling_ratio=4,
                head="paper",
            )
        )
    ),
)
optim_wrapper = dict(
    constructor="mmdeform.OffsetLrConstructor",
    paramwise_cfg=dict(offset=dict(roi=dict(lr_mult=0.01))),
)

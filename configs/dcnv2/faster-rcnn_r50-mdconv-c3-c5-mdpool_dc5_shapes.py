_base_ = "./faster-rcnn_r50_dc5_shapes.py"
model = dict(
    backbone=dict(
        dcn=dict(type="mmdeform.DCNv2", deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            roi_layer=dict(
                type="mmdeform.ModulatedDeformRoIPoolPack",
                output_channels=64,
                deform_fc_channels=256,
                head="paper",
            )
        )
    ),
)

_base_ = "./faster-rcnn_r50_shapes.py"
model = dict(
    roi_head=dict(
        bbox_roi_extractor=dict(
            type="mmdeform.SingleRoIExtractor",
            roi_layer=dict(
                type="mmdeform.ModulatedDeformRoIPoolPack",
                output_channels=64,
                deform_fc_channels=256,
            ),
        )
    )
)

_base_ = "../dcnv2/faster-rcnn_r50_shapes.py"
model = dict(
    roi_head=dict(
        bbox_roi_extractor=dict(
            type="mmdeform.SingleRoIExtractor",
            roi_layer=dict(type="mmdeform.DeformRoIPoolPack", output_channels=64, head="paper"),
        )
    )
)
# As in the paper: the layer that predicts offsets learns slowly.
optim_wrapper = dict(
    constructor="mmdeform.OffsetLrConstructor",
    paramwise_cfg=dict(offset=dict(roi=dict(lr_mult=0.01))),
)

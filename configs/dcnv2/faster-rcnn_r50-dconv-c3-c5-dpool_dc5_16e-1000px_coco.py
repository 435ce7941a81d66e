# Version 1's RoI pooling learns at version 1's rate.
_base_ = "./faster-rcnn_r50-dconv-c3-c5_dc5_16e-1000px_coco.py"
model = dict(
    roi_head=dict(
        bbox_roi_extractor=dict(
            roi_layer=dict(type="mmdeform.DeformRoIPoolPack", output_channels=256, head="paper")
        )
    )
)
optim_wrapper = dict(
    constructor="mmdeform.OffsetLrConstructor",
    paramwise_cfg=dict(offset=dict(roi=dict(lr_mult=0.01))),
)

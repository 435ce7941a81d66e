# Modulated convolution and RoI pooling on a small real data set.
_base_ = [
    "../_base_/models/faster-rcnn_r50-small.py",
    "../_base_/datasets/bccd_detection.py",
    "../_base_/schedules/shapes_12e.py",
    "../_base_/shapes_runtime.py",
]
model = dict(
    backbone=dict(
        dcn=dict(type="mmdeform.DCNv2", deform_groups=1),
        stage_with_dcn=(False, True, True, True),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            type="mmdeform.SingleRoIExtractor",
            roi_layer=dict(
                type="mmdeform.ModulatedDeformRoIPoolPack",
                output_channels=64,
                deform_fc_channels=256,
            ),
        ),
        bbox_head=dict(num_classes=3),
    ),
)

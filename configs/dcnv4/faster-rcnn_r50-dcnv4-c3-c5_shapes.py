_base_ = "../dcnv2/faster-rcnn_r50_shapes.py"
model = dict(
    backbone=dict(
        dcn=dict(type="mmdeform.DCNv4", group_channels=16, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
    )
)

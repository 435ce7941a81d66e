_base_ = "../dcnv2/mask-rcnn_r50_shapes.py"
model = dict(
    backbone=dict(
        dcn=dict(type="mmdeform.DCN", deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
    )
)

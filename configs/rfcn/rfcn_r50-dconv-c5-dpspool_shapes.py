_base_ = "./rfcn_r50-dpspool_shapes.py"
model = dict(
    backbone=dict(
        dcn=dict(type="mmdeform.DCN", deform_groups=4, fallback_on_stride=False),
        stage_with_dcn=(False, False, False, True),
    )
)

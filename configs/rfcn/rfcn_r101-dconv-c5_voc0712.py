_base_ = "./rfcn_r101_voc0712.py"
model = dict(
    backbone=dict(
        dcn=dict(type="mmdeform.DCN", deform_groups=4, fallback_on_stride=False),
        stage_with_dcn=(False, False, False, True),
    )
)

_base_ = "./faster-rcnn_r101-dpool_dc5_14e-600px_voc0712.py"
model = dict(
    backbone=dict(
        dcn=dict(type="mmdeform.DCN", deform_groups=4, fallback_on_stride=False),
        stage_with_dcn=(False, False, False, True),
    )
)

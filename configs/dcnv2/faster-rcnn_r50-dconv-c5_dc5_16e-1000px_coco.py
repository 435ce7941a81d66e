_base_ = "./faster-rcnn_r50_dc5_16e-1000px_coco.py"
model = dict(
    backbone=dict(
        dcn=dict(type="mmdeform.DCN", deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, False, False, True),
    )
)

_base_ = "mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["mmdeform"], allow_failed_imports=False)
model = dict(
    backbone=dict(
        dcn=dict(type="mmdeform.DCN", deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
    )
)

_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["mmdeform"], allow_failed_imports=False)
model = dict(
    backbone=dict(
        dcn=dict(type="mmdeform.DCNv3", group_channels=16, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
    )
)

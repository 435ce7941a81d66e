# Deformable convolution in the backbone beside deformable attention.
_base_ = "./deformable-detr-refine_r50_shapes.py"
model = dict(
    backbone=dict(
        dcn=dict(type="mmdeform.DCNv2", deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
    )
)

# The levels come from a feature pyramid.
_base_ = "./deformable-detr-refine_r50_shapes.py"
model = dict(
    neck=dict(
        _delete_=True,
        type="FPN",
        in_channels=[128, 256, 512],
        out_channels=128,
        norm_cfg=dict(type="GN", num_groups=32),
        num_outs=3,
    )
)

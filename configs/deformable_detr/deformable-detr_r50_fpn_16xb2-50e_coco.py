# The levels come from a feature pyramid: C3 to C5, and C6 by a convolution of stride 2 on C5.
_base_ = "./deformable-detr_r50_16xb2-50e_coco.py"
model = dict(
    neck=dict(
        _delete_=True,
        type="FPN",
        in_channels=[512, 1024, 2048],
        out_channels=256,
        norm_cfg=dict(type="GN", num_groups=32),
        add_extra_convs="on_input",
        num_outs=4,
    )
)

# Single-scale attention over C5 (stride 32), 1 point per head.
_base_ = "./deformable-detr-refine_r50_shapes.py"
attention = dict(num_levels=1, num_points=1)
model = dict(
    num_feature_levels=1,
    backbone=dict(out_indices=(3,)),
    neck=dict(in_channels=[512], num_outs=1),
    encoder=dict(layer_cfg=dict(self_attn_cfg=attention)),
    decoder=dict(layer_cfg=dict(cross_attn_cfg=attention)),
)

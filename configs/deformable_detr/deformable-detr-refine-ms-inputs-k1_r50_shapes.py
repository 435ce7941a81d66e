# Multi-scale inputs without multi-scale attention in the encoder, 1 point per head and level.
_base_ = "./deformable-detr-refine_r50_shapes.py"
model = dict(
    encoder=dict(
        layer_cfg=dict(
            self_attn_cfg=dict(
                type="mmdeform.SingleLevelDeformableAttention", num_levels=1, num_points=1
            )
        )
    ),
    decoder=dict(layer_cfg=dict(cross_attn_cfg=dict(num_points=1))),
)

# Multi-scale inputs without multi-scale attention in the encoder, 4 points per head and level.
_base_ = "./deformable-detr_r50_16xb2-50e_coco.py"
model = dict(
    encoder=dict(
        layer_cfg=dict(
            self_attn_cfg=dict(type="mmdeform.SingleLevelDeformableAttention", num_points=4)
        )
    ),
    decoder=dict(layer_cfg=dict(cross_attn_cfg=dict(num_points=4))),
)

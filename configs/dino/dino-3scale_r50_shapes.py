# The small Deformable DETR turned into DINO: proposals of the encoder as boxes only, denoising, no
# dropout, and reference points that pass gradients between layers. It has 256 channels in place of
# 128, because the decoder of mmdet's DINO knows no other number.
_base_ = "../deformable_detr/deformable-detr-refine_r50_shapes.py"
custom_imports = dict(imports=["mmdeform", "mmdeform.typed_attention"], allow_failed_imports=False)
embed_dims = 256
attention = dict(type="mmdeform.MultiScaleDeformableAttention", embed_dims=embed_dims, dropout=0.0)
model = dict(
    type="DINO",
    as_two_stage=True,
    neck=dict(out_channels=embed_dims),
    encoder=dict(layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=dict(embed_dims=embed_dims))),
    decoder=dict(
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=embed_dims),
            cross_attn_cfg=attention,
            ffn_cfg=dict(embed_dims=embed_dims),
        )
    ),
    positional_encoding=dict(num_feats=embed_dims // 2, offset=0.0, temperature=20),
    bbox_head=dict(type="DINOHead", embed_dims=embed_dims, loss_cls=dict(loss_weight=1.0)),
    dn_cfg=dict(
        label_noise_scale=0.5,
        box_noise_scale=1.0,
        group_cfg=dict(dynamic=True, num_groups=None, num_dn_queries=20),
    ),
)

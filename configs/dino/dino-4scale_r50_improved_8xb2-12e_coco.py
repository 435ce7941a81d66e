_base_ = "mmdet::dino/dino-4scale_r50_improved_8xb2-12e_coco.py"
custom_imports = dict(imports=["mmdeform", "mmdeform.typed_attention"], allow_failed_imports=False)
attention = dict(type="mmdeform.MultiScaleDeformableAttention")
model = dict(
    encoder=dict(layer_cfg=dict(self_attn_cfg=attention)),
    decoder=dict(layer_cfg=dict(cross_attn_cfg=attention)),
)

"""Dense attention of mmdet's own classes."""

from typing import Any

import torch
from mmdet.models.backbones.pvt import SpatialReductionAttention
from mmdet.models.backbones.swin import WindowMSA
from mmdet.models.layers.transformer.utils import ConditionalAttention
from torch import Tensor

from .core import Attention, attention_of
from .dense import boolean, dot_product_attention, split_heads, spread_attn_mask

# It has another signature than its base class; torch's layer within it is the one to ask.
attention_of.register(SpatialReductionAttention, attention_of.dispatch(object))

# What Swin adds to the logits of pixels that do not belong together.
APART = -100.0


@attention_of.register(ConditionalAttention)
def _conditional_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    query_pos: Tensor | None = None,
    ref_sine_embed: Tensor | None = None,
    key_pos: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_first: bool = False,
    **_: Any,
) -> Attention:
    heads = module.num_heads
    queries = module.qcontent_proj(query)
    if module.cross_attn:
        keys, key_position = module.kcontent_proj(key), module.kpos_proj(key_pos)
        if is_first or module.keep_query_pos:
            queries, keys = queries + module.qpos_proj(query_pos), keys + key_position
        position = module.qpos_sine_proj(ref_sine_embed)
        # Each head compares contents and positions side by side.
        pairs = ((queries, position), (keys, key_position))
        queries, keys = (torch.cat([split_heads(t, heads) for t in pair], -1) for pair in pairs)
    else:
        queries = split_heads(queries + module.qpos_proj(query_pos), heads)
        keys = split_heads(module.kcontent_proj(query) + module.kpos_proj(query_pos), heads)
    return dot_product_attention(
        queries,
        keys,
        queries.shape[-1] ** -0.5,
        not module.cross_attn,
        spread_attn_mask(attn_mask, heads),
        boolean(key_padding_mask),
    )


@attention_of.register(WindowMSA)
def _window_attention(module: Any, x: Tensor, mask: Tensor | None = None) -> Attention:
    windows, pixels, channels = x.shape
    query, key, _ = module.qkv(x).split(channels, -1)
    index = module.relative_position_index.flatten()
    bias = module.relative_position_bias_table[index].view(1, pixels, pixels, -1)
    apart = None
    if mask is not None:  # (windows of an image, Lq, Nk)
        mask = mask.masked_fill(mask <= APART, -torch.inf)
        apart = mask.repeat(windows // len(mask), 1, 1)[:, None]
    return dot_product_attention(
        split_heads(query, module.num_heads),
        split_heads(key, module.num_heads),
        module.scale,
        True,
        attn_mask=apart,
        bias=bias.permute(0, 3, 1, 2),
    )

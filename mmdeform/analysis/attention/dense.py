"""Attention to keys that all queries share."""

from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import transformer as mmcv_transformer
from torch import Tensor, nn

from mmdeform.layers.dat_attn import DeformableAttention2d
from mmdeform.layers.sampling import sampled

from .core import Attention, attention_of

__all__ = ["boolean", "dot_product_attention", "split_heads", "spread_attn_mask"]


def dot_product_attention(
    query: Tensor,
    key: Tensor,
    scale: float,
    self_attention: bool,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Attention:
    """Softmax of scaled products of queries and keys.

    Args:
        query: Shape (N, M, Lq, D).
        key: Shape (N, M, Nk, D).
        scale: Factor of the products.
        self_attention: Whether queries and keys come from the same tensor, in the same order. What
            is padding among the keys then is padding among the queries.
        attn_mask: Bool, True where a query may not attend to a key, or numbers that are added to
            the logits, minus infinity where it may not; broadcasts to (N, M, Lq, Nk).
        key_padding_mask: The same for keys alone, shape (N, Nk).
        bias: Added to the logits, broadcasts to (N, M, Lq, Nk); masks nothing.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(dtype) * scale, key.to(dtype)
    batch, heads, count = query.shape[:3]
    masks = [] if attn_mask is None else [attn_mask]
    padding = None
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None])
        if self_attention:
            padding = _forbidden(key_padding_mask)[:, :count]

    def weigh(queries: Tensor) -> Tensor:
        queries = queries.to(query.device)
        logits = query[:, :, queries] @ key.transpose(2, 3)
        for mask in masks if bias is None else [*masks, bias]:
            rows = _rows(mask, queries)
            if rows.dtype == torch.bool:
                logits = logits.masked_fill(rows, -torch.inf)
            else:
                logits = logits + rows.to(dtype)
        return logits.softmax(-1)

    def admit(queries: Tensor) -> Tensor:
        queries = queries.to(query.device)
        admitted = torch.ones((1, 1, 1, key.shape[2]), dtype=torch.bool, device=key.device)
        for mask in masks:
            admitted = admitted & ~_forbidden(_rows(mask, queries))
        return admitted

    return Attention(
        kind="dense",
        self_attention=self_attention,
        batch=batch,
        heads=heads,
        queries=count,
        keys=key.shape[2],
        weigh=weigh,
        admit=admit if masks else None,
        padding=padding,
    )


def _rows(mask: Tensor, queries: Tensor) -> Tensor:
    """Some queries of what broadcasts to (N, M, Lq, Nk)."""
    return mask if mask.shape[2] == 1 else mask[:, :, queries]


def _forbidden(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask == -torch.inf


def split_heads(tensor: Tensor, heads: int) -> Tensor:
    """(N, L, M * D) as (N, M, L, D)."""
    return tensor.unflatten(2, (heads, -1)).transpose(1, 2)


def boolean(mask: Tensor | None) -> Tensor | None:
    """Masks of integers, which older code gives, as bool; others as they are."""
    return mask if mask is None or mask.is_floating_point() else mask.bool()


def spread_attn_mask(mask: Tensor | None, heads: int) -> Tensor | None:
    """torch's attention masks, (Lq, Nk) or (N * M, Lq, Nk), as (1, 1, Lq, Nk) or (N, M, Lq, Nk)."""
    mask = boolean(mask)
    if mask is None:
        return None
    return mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (-1, heads))


@attention_of.register(nn.MultiheadAttention)
def _torch_attention(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    **_: Any,
) -> Attention:
    self_attention = query is key
    if query.dim() == 2:  # one image, without a dimension for it
        query, key = query[None], key[None]
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    elif not module.batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    return _multi_head(module, query, key, self_attention, attn_mask, key_padding_mask)


@attention_of.register(mmcv_transformer.MultiheadAttention)
def _mmcv_attention(
    module: mmcv_transformer.MultiheadAttention,
    query: Tensor,
    key: Tensor | None = None,
    query_pos: Tensor | None = None,
    key_pos: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    **_: Any,
) -> Attention:
    key = query if key is None else key
    self_attention = query is key
    if key_pos is None and query_pos is not None and query_pos.shape == key.shape:
        key_pos = query_pos
    query = query if query_pos is None else query + query_pos
    key = key if key_pos is None else key + key_pos
    if not module.batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    return _multi_head(module.attn, query, key, self_attention, attn_mask, key_padding_mask)


def _multi_head(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    self_attention: bool,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
) -> Attention:
    """Attention of torch's module for tensors (N, L, C)."""
    weights = (module.q_proj_weight, module.k_proj_weight)
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)[:2]
    biases = (None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)[:2]
    query, key = F.linear(query, weights[0], biases[0]), F.linear(key, weights[1], biases[1])
    # Keys that belong to the layer: they come last, and no mask reaches them.
    added = [] if module.bias_k is None else [module.bias_k.expand(len(key), -1, -1)]
    added += [key.new_zeros(len(key), 1, key.shape[2])] if module.add_zero_attn else []
    attn_mask = spread_attn_mask(attn_mask, module.num_heads)
    key_padding_mask = boolean(key_padding_mask)
    return dot_product_attention(
        split_heads(query, module.num_heads),
        split_heads(torch.cat([key, *added], 1), module.num_heads),
        module.head_dim**-0.5,
        self_attention,
        None if attn_mask is None else F.pad(attn_mask, (0, len(added))),
        None if key_padding_mask is None else F.pad(key_padding_mask, (0, len(added))),
    )


@attention_of.register(DeformableAttention2d)
def _dat_attention(module: DeformableAttention2d, x: Tensor, **_: Any) -> Attention:
    sampling = sampled(module, (x,))
    return Attention(
        kind="dense",
        self_attention=True,
        batch=x.shape[0],
        heads=module.num_heads,
        queries=x.shape[2:].numel(),
        keys=sampling.locations.shape[2:4].numel(),
        weigh=lambda queries: module.attention(x, queries.to(x.device)),
        sampling=sampling,
    )

"""Attention to samples: each query has its own, with weights that a softmax makes sum to 1."""

from typing import Any

from mmcv.ops import multi_scale_deform_attn as mmcv_msda
from torch import Tensor, nn

from mmdeform.layers.dcnv3 import DCNv3
from mmdeform.layers.sampling import Sampling, sampled

from .core import Attention, attention_of
from .dense import boolean


@attention_of.register(mmcv_msda.MultiScaleDeformableAttention)
def _deformable_attention(
    module: nn.Module,
    query: Tensor,
    value: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    **inputs: Any,
) -> Attention:
    sampling = sampled(module, (query,), {"value": value, **inputs})
    self_attention = value is None or value is query
    return _samples(sampling, "deformable", 2, self_attention, boolean(key_padding_mask))


@attention_of.register(DCNv3)
def _taps(module: DCNv3, x: Tensor, **_: Any) -> Attention:
    return _samples(sampled(module, (x,)), "taps", 1, True)


def _samples(
    sampling: Sampling,
    kind: Any,
    head_dim: int,
    self_attention: bool,
    key_padding_mask: Tensor | None = None,
) -> Attention:
    """From samples whose weights have the heads in dimension ``head_dim``."""
    assert sampling.mask is not None and sampling.weighting == "softmax"
    samples = sampling.sample_dims
    rest = [d for d in range(1, sampling.mask.dim()) if d != head_dim and d not in samples]
    weights = sampling.mask.permute(0, head_dim, *rest, *samples)
    weights = weights.flatten(-len(samples)).flatten(2, -2)  # (N, M, Lq, samples)
    batch, heads, queries, keys = weights.shape
    # Deformable attention does not mask padding, it reads zeros there: all samples count.
    padding = key_padding_mask if self_attention else None
    return Attention(
        kind=kind,
        self_attention=self_attention,
        batch=batch,
        heads=heads,
        queries=queries,
        keys=keys,
        weigh=lambda chosen: weights[:, :, chosen.to(weights.device)],
        padding=padding,
        sampling=sampling,
    )

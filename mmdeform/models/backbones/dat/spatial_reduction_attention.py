"""Attention to a downsampled map.

Source: Wang et al., "Pyramid Vision Transformer" (2021), https://arxiv.org/abs/2102.12122, as it is
used in https://github.com/LeapLabTHU/DAT.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mmdeform.layers.layer_norm import LayerNorm2d

from .resize import FullConv2d

__all__ = ["SpatialReductionAttention"]


class SpatialReductionAttention(nn.Module):
    """Every pixel attends to a map that a convolution made smaller.

    Maps of any size: what does not fill a patch of ``sr_ratio`` pixels is padded with zeros.

    Args:
        dims: Channels C; divisible by ``num_heads``.
        num_heads: Heads M.
        sr_ratio: By how much the map is made smaller; 1: not at all. Default: 1.
        attn_drop: Dropout of attention weights. Default: 0.0.
        proj_drop: Dropout of the output. Default: 0.0.
    """

    def __init__(
        self,
        dims: int,
        num_heads: int,
        sr_ratio: int = 1,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.q = nn.Conv2d(dims, dims, 1)
        self.kv = nn.Conv2d(dims, 2 * dims, 1)
        self.proj = nn.Conv2d(dims, dims, 1)
        self.proj_drop = nn.Dropout(proj_drop)
        self.proj_ds: nn.Module = nn.Identity()
        if sr_ratio > 1:
            self.proj_ds = nn.Sequential(
                FullConv2d(dims, dims, sr_ratio, sr_ratio), LayerNorm2d(dims)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        query = self._heads(self.q(x))
        key, value = map(self._heads, self.kv(self.proj_ds(x)).chunk(2, 1))
        dropout = self.attn_drop if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.proj_drop(self.proj(out.transpose(2, 3).reshape(x.shape)))

    def _heads(self, x: Tensor) -> Tensor:
        return x.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3)

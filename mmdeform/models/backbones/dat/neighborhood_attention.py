"""Attention to the neighbourhood of each pixel.

Source: Hassani et al., "Neighborhood Attention Transformer" (2023),
https://arxiv.org/abs/2204.07143, with the relative position bias that its package has dropped.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .neighborhood import neighborhood_attention

__all__ = ["NeighborhoodAttention"]


class NeighborhoodAttention(nn.Module):
    """Self-attention of each pixel to the k*k window around it, with a relative position bias.

    Near borders windows are moved inward, so that all have k*k keys. Maps smaller than a window are
    padded on the right and at the bottom with zeros, which take part in the attention.

    Args:
        dims: Channels C; divisible by ``num_heads``.
        num_heads: Heads M.
        kernel_size: Size of the window k, odd and greater than 1. Default: 7.
        attn_drop: Dropout of attention weights. Default: 0.0.
        proj_drop: Dropout of the output. Default: 0.0.

    Raises:
        ValueError: ``kernel_size`` is even or too small.
    """

    def __init__(
        self,
        dims: int,
        num_heads: int,
        kernel_size: int = 7,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number from 3 on, got {kernel_size}")
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dims, 3 * dims)
        span = 2 * kernel_size - 1
        self.rpb = nn.Parameter(torch.zeros(num_heads, span, span))
        nn.init.trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(dims, dims)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        height, width = x.shape[2:]
        down, right = (max(0, self.kernel_size - length) for length in (height, width))
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, right, 0, down))
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)
        drop = self.attn_drop if self.training else 0.0
        x = neighborhood_attention(*qkv.unbind(0), self.rpb, drop)  # (B, M, H, W, C / M)
        x = x.permute(0, 2, 3, 1, 4).flatten(-2)[:, :height, :width]
        return self.proj_drop(self.proj(x)).permute(0, 3, 1, 2)

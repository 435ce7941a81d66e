"""Attention to the neighbourhood of each pixel.

Source: Hassani et al., "Neighborhood Attention Transformer" (2023),
https://arxiv.org/abs/2204.07143, with the relative position bias that its package has dropped.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["NeighborhoodAttention"]

_CHUNK = 2**21  # gathered elements of keys and values in flight


class NeighborhoodAttention(nn.Module):
    """Self-attention of each pixel to the k*k window around it, with a relative position bias.

    Near borders windows are moved inward, so that all have k*k keys. Maps smaller than a window are
    padded on the right and at the bottom with zeros, which take part in the attention.

    Windows are gathered for some rows of queries at a time, and again in the backward pass, so that
    memory stays bounded.

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
            raise ValueError(
                f"kernel_size: expected an odd number of at least 3, got {kernel_size}"
            )
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.scale = (dims // num_heads) ** -0.5
        self.qkv = nn.Linear(dims, 3 * dims)
        span = 2 * kernel_size - 1
        self.rpb = nn.Parameter(torch.zeros(num_heads, span, span))
        nn.init.trunc_normal_(self.rpb, std=0.02)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dims, dims)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        height, width = x.shape[2:]
        x = x.permute(0, 2, 3, 1)
        down, right = (max(0, self.kernel_size - length) for length in (height, width))
        x = F.pad(x, (0, 0, 0, right, 0, down))
        x = self._attend(self.qkv(x))[:, :height, :width]
        return self.proj_drop(self.proj(x)).permute(0, 3, 1, 2)

    def _attend(self, qkv: Tensor) -> Tensor:
        batch, height, width, _ = qkv.shape
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)
        query = qkv[0].flatten(0, 1) * self.scale  # (B * M, H, W, C / M)
        # Key and value of a pixel side by side, in one row of a table: gathered at once.
        table = torch.cat((qkv[1], qkv[2]), -1).flatten(0, -2)
        first_y, first_x = (self._first(length, qkv.device) for length in (height, width))
        per_row = table.shape[-1] * width * self.kernel_size**2 * query.shape[0]
        step = max(1, _CHUNK // per_row)
        chunks = []
        for top in range(0, height, step):
            rows = slice(top, top + step)
            arguments = (query[:, rows], table, top, first_y[rows], first_x, height)
            chunks.append(
                checkpoint(self._attend_rows, *arguments, use_reentrant=False)
                if torch.is_grad_enabled()
                else self._attend_rows(*arguments)
            )
        out = torch.cat(chunks, 1)
        return out.unflatten(0, (batch, -1)).permute(0, 2, 3, 1, 4).flatten(-2)

    def _attend_rows(
        self,
        query: Tensor,
        table: Tensor,
        top: int,
        first_y: Tensor,
        first_x: Tensor,
        height: int,
    ) -> Tensor:
        """Attention of some rows of queries.

        Args:
            query: Shape (B * M, R, W, D); the rows ``top`` and following.
            table: Keys and values of all pixels, shape (B * M * H * W, 2 * D).
            top: First row of queries.
            first_y: First row of the windows of these queries, shape (R,).
            first_x: First column of the windows, shape (W,).
            height: H.

        Returns:
            Shape (B * M, R, W, D).
        """
        heads, rows, width, dims = query.shape
        taps = torch.arange(self.kernel_size, device=query.device)
        y, x = first_y[:, None] + taps, first_x[:, None] + taps  # (R, k), (W, k)
        pixel = y[:, None, :, None] * width + x[None, :, None, :]  # (R, W, k, k)
        head = torch.arange(heads, device=query.device) * (height * width)
        index = head[:, None] + pixel.flatten()
        windows = F.embedding(index, table).view(heads, rows, width, -1, 2 * dims)
        key, value = windows.split(dims, -1)

        above = y - torch.arange(top, top + rows, device=query.device)[:, None]
        left = x - torch.arange(width, device=query.device)[:, None]
        middle = self.kernel_size - 1
        bias = self.rpb[:, above[:, None, :, None] + middle, left[None, :, None, :] + middle]
        logits = query[..., None, :] @ key.transpose(-2, -1)  # (B * M, R, W, 1, k * k)
        logits = logits.unflatten(0, (-1, self.num_heads)) + bias.flatten(-2)[..., None, :]
        weights = self.attn_drop(logits.softmax(-1)).flatten(0, 1)
        return (weights @ value).squeeze(-2)

    def _first(self, length: int, device: torch.device) -> Tensor:
        """First pixel of the window of each pixel, along one axis."""
        first = torch.arange(length, device=device) - self.kernel_size // 2
        return first.clamp(0, length - self.kernel_size)

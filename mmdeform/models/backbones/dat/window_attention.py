"""Attention within windows, regular or shifted.

Source: Liu et al., "Swin Transformer" (2021), https://arxiv.org/abs/2103.14030, as it is used in
https://github.com/LeapLabTHU/DAT.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ShiftedWindowAttention", "WindowAttention"]


class WindowAttention(nn.Module):
    """Self-attention within windows that do not overlap, with a relative position bias.

    Maps of any size: they are padded on the right and at the bottom with zeros, which take part in
    the attention, and the result is cropped.

    Args:
        dims: Channels C; divisible by ``num_heads``.
        num_heads: Heads M.
        window_size: Height and width of a window. Default: 7.
        attn_drop: Dropout of attention weights. Default: 0.0.
        proj_drop: Dropout of the output. Default: 0.0.
    """

    def __init__(
        self,
        dims: int,
        num_heads: int,
        window_size: int = 7,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.scale = (dims // num_heads) ** -0.5
        self.proj_qkv = nn.Linear(dims, 3 * dims)
        self.proj_out = nn.Linear(dims, dims)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj_drop = nn.Dropout(proj_drop)
        span = 2 * window_size - 1
        self.relative_position_bias_table = nn.Parameter(torch.zeros(span**2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.01)
        index = _relative_position_index(window_size)
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        height, width = x.shape[2:]
        x = x.permute(0, 2, 3, 1)
        x = F.pad(x, (0, 0, 0, -width % self.window_size, 0, -height % self.window_size))
        x = self._attend_to_windows(x)[:, :height, :width]
        return x.permute(0, 3, 1, 2)

    def _attend_to_windows(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, H, W, C), made of whole windows; ``mask`` is added to logits (windows, 1, N, N)."""
        batch, height, width, channels = x.shape
        size = self.window_size
        rows, columns = height // size, width // size
        x = x.reshape(batch, rows, size, columns, size, channels).transpose(2, 3)
        x = x.reshape(batch, rows * columns, size * size, channels)
        qkv = self.proj_qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
        query, key, value = qkv.unbind(0)  # (B, windows, M, N, C / M)
        logits = (query * self.scale) @ key.transpose(-2, -1) + self._bias()
        if mask is not None:
            logits = logits + mask
        weights = self.attn_drop(logits.softmax(-1))
        x = (weights @ value).transpose(2, 3).flatten(-2)
        x = self.proj_drop(self.proj_out(x))
        x = x.reshape(batch, rows, columns, size, size, channels).transpose(2, 3)
        return x.reshape(batch, height, width, channels)

    def _bias(self) -> Tensor:
        """Bias of each head, query and key of a window, (M, N, N)."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)


class ShiftedWindowAttention(WindowAttention):
    """Attention within windows that are shifted by half their size, rounded up.

    The map is rolled, so that windows hold pieces from opposite borders, which do not attend to
    each other. Swin rounds half a window down.

    Args: those of :class:`WindowAttention`.

    Raises:
        ValueError: The window is too small to be shifted.
    """

    def __init__(self, dims: int, num_heads: int, window_size: int = 7, *args: float) -> None:
        if window_size < 2:
            raise ValueError(
                f"window_size: expected at least 2 for shifted windows, got {window_size}"
            )
        super().__init__(dims, num_heads, window_size, *args)
        self.shift = (window_size + 1) // 2

    def _attend_to_windows(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x.roll((-self.shift, -self.shift), dims=(1, 2))
        x = super()._attend_to_windows(x, self.attention_mask(x))
        return x.roll((self.shift, self.shift), dims=(1, 2))

    def attention_mask(self, x: Tensor) -> Tensor:
        """-100 between pixels that the roll brought into one window, else 0, (windows, 1, N, N).

        Args:
            x: Map (B, H, W, C), made of whole windows of N pixels; its values do not matter.
        """
        size = self.window_size
        rows, columns = (self._regions(length, x.device).view(-1, size) for length in x.shape[1:3])
        regions = 3 * rows[:, None, :, None] + columns[None, :, None, :]
        regions = regions.reshape(-1, size * size)
        apart = regions[:, None, :, None] != regions[:, None, None, :]
        return apart.to(x.dtype) * -100.0

    def _regions(self, length: int, device: torch.device) -> Tensor:
        """Along one axis: 0 in whole windows, then 1, and 2 behind the seam."""
        position = torch.arange(length, device=device)
        return (position >= length - self.window_size).long() + (position >= length - self.shift)


def _relative_position_index(size: int) -> Tensor:
    """Row of the bias table for each query and key of a window, (N, N)."""
    axis = torch.arange(size)
    pixels = torch.cartesian_prod(axis, axis)
    offset = pixels[:, None] - pixels[None] + size - 1
    return offset[..., 0] * (2 * size - 1) + offset[..., 1]

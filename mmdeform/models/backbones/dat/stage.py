"""A stage: blocks of attention and MLP at one resolution."""

from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn.bricks import DropPath
from mmcv.cnn.bricks.scale import LayerScale
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmdeform.layers import DeformableAttention2d
from mmdeform.layers.layer_norm import LayerNorm2d

from .arch import StageSpec
from .mlp import MLP, ConvMLP
from .neighborhood_attention import NeighborhoodAttention
from .spatial_reduction_attention import SpatialReductionAttention
from .window_attention import ShiftedWindowAttention, WindowAttention

__all__ = ["DATStage"]


class DATStage(nn.Module):
    """Blocks of x + attention(norm(x)) and x + MLP(norm(x)).

    A local perception unit, a depthwise convolution added to its input, may come first.

    Args:
        in_channels: Channels of the input; a 1x1 convolution makes ``spec.dims`` of others.
        spec: Blocks and their settings.
        feat_size: (H, W) for which tables of position biases are made; maps may have any size.
        version: Geometry of deformable attention, 'v1' or 'pp'.
        drop_path_rates: Of each block.
        drop_rate: Dropout of projections and MLPs. Default: 0.0.
        attn_drop_rate: Dropout of attention weights. Default: 0.0.
        backend: Of deformable attention. Default: 'auto'.
        with_cp: Recompute blocks in the backward pass. Default: False.
    """

    def __init__(
        self,
        in_channels: int,
        spec: StageSpec,
        feat_size: tuple[int, int],
        version: str,
        drop_path_rates: Sequence[float],
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        backend: str = "auto",
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        dims, codes = spec.dims, spec.stage_specs
        depth = len(codes)
        self.with_cp = with_cp
        self.proj = nn.Conv2d(in_channels, dims, 1) if in_channels != dims else nn.Identity()
        self.layer_norms = nn.ModuleList(LayerNorm2d(dims) for _ in range(2 * depth))
        mlp = ConvMLP if spec.dwc_mlp else MLP
        hidden_dims = int(dims * spec.mlp_ratio)
        self.mlps = nn.ModuleList(mlp(dims, hidden_dims, drop_rate) for _ in codes)
        deformable = dict(
            feat_size=feat_size, version=version, backend=backend, attn_drop=attn_drop_rate,
            proj_drop=drop_rate,
        )  # fmt: skip
        self.attns = nn.ModuleList(
            _attention(code, spec, (attn_drop_rate, drop_rate), deformable) for code in codes
        )
        self.drop_path = nn.ModuleList(DropPath(rate) for rate in drop_path_rates)
        self.layer_scales = nn.ModuleList(
            nn.Identity()
            if spec.layer_scale is None
            else LayerScale(dims, data_format="channels_first", scale=spec.layer_scale)
            for _ in range(2 * depth)
        )
        self.local_perception_units = nn.ModuleList(
            nn.Conv2d(dims, dims, 3, padding=1, groups=dims) for _ in codes if spec.lpu
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, dims, H, W)."""
        x = self.proj(x)
        for index in range(len(self.attns)):
            if self.with_cp and torch.is_grad_enabled():
                x = checkpoint(self._block, x, index, use_reentrant=False)
            else:
                x = self._block(x, index)
        return x

    def _block(self, x: Tensor, index: int) -> Tensor:
        if self.local_perception_units:
            x = x + self.local_perception_units[index](x)
        for half, module in enumerate((self.attns[index], self.mlps[index])):
            step = module(self.layer_norms[2 * index + half](x))
            x = x + self.drop_path[index](self.layer_scales[2 * index + half](step))
        return x


def _attention(
    code: str, spec: StageSpec, drop: tuple[float, float], deformable: dict[str, Any]
) -> nn.Module:
    dims, num_heads = spec.dims, spec.num_heads
    if code == "L":
        return WindowAttention(dims, num_heads, spec.window_sizes, *drop)
    if code == "S":
        return ShiftedWindowAttention(dims, num_heads, spec.window_sizes, *drop)
    if code == "N":
        return NeighborhoodAttention(dims, num_heads, spec.neighborhood_sizes, *drop)
    if code == "P":
        return SpatialReductionAttention(dims, num_heads, spec.sr_ratios, *drop)
    return DeformableAttention2d(
        dims,
        num_heads,
        spec.num_groups,
        stride=spec.strides,
        kernel_size=spec.kernel_sizes,
        offset_range_factor=spec.offset_range_factors,
        position_bias=spec.position_bias,
        use_offsets=spec.use_offsets,
        **deformable,
    )

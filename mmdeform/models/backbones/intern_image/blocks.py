"""The parts of InternImage; maps are channels last, (N, H, W, C)."""

from collections.abc import Callable, Sequence

import torch
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .arch import Arch

__all__ = ["Stage", "Stem", "linear"]


class _Permute(nn.Module):
    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


def _norm(channels: int) -> nn.Sequential:
    """Of (N, H, W, C). A sequence of one: the names of the published state dict."""
    return nn.Sequential(nn.LayerNorm(channels, eps=1e-6))


def _norm_behind_conv(channels: int) -> nn.Sequential:
    """Normalises (N, C, H, W) and gives (N, H, W, C)."""
    return nn.Sequential(_Permute(0, 2, 3, 1), nn.LayerNorm(channels, eps=1e-6))


def linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """A linear layer as published: truncated normal weights, zero bias."""
    layer = nn.Linear(in_features, out_features, bias)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class Stem(nn.Module):
    """Two convolutions of stride 2: images (N, in_channels, H, W) to maps (N, H/4, W/4, C)."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels // 2, 3, stride=2, padding=1)
        self.norm1 = _norm_behind_conv(channels // 2)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1)
        self.norm2 = _norm_behind_conv(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(x.permute(0, 3, 1, 2)))


class Downsample(nn.Module):
    """A convolution of stride 2 between stages: (N, H, W, C) to (N, H/2, W/2, 2C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.norm = _norm_behind_conv(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)))


class MLP(nn.Module):
    """Two linear layers with a GELU between them, for each pixel."""

    def __init__(self, channels: int, hidden_channels: int, fc2_bias: bool) -> None:
        super().__init__()
        self.fc1 = linear(channels, hidden_channels)
        self.act = nn.GELU()
        self.fc2 = linear(hidden_channels, channels, fc2_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """x + scale * f(norm(x)), or with ``post_norm`` x + scale * norm(f(x)), f a DCN, then an MLP.

    Args:
        dcn: The deformable convolution.
        channels: Channels C.
        arch: Settings of the backbone.
        drop_path_rate: Rate at which residuals are left out.
    """

    def __init__(self, dcn: nn.Module, channels: int, arch: Arch, drop_path_rate: float) -> None:
        super().__init__()
        self.post_norm = arch.post_norm
        self.norm1 = _norm(channels)
        self.dcn = dcn
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = _norm(channels)
        self.mlp = MLP(channels, int(channels * arch.mlp_ratio), arch.mlp_fc2_bias)
        for name in ("gamma1", "gamma2"):
            scale = arch.layer_scale
            gamma = None if scale is None else nn.Parameter(torch.full((channels,), float(scale)))
            self.register_parameter(name, gamma)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._residual(self.dcn, self.norm1, self.gamma1, x)
        return x + self._residual(self.mlp, self.norm2, self.gamma2, x)

    def _residual(
        self, module: nn.Module, norm: nn.Module, gamma: Tensor | None, x: Tensor
    ) -> Tensor:
        x = norm(module(x)) if self.post_norm else module(norm(x))
        return self.drop_path(x if gamma is None else gamma * x)


class Stage(nn.Module):
    """Blocks at one resolution and, in front of another stage, the way there.

    Args:
        make_dcn: Makes the deformable convolution of a block.
        channels: Channels C.
        arch: Settings of the backbone.
        drop_path_rates: Of each block.
        downsample: Whether a stage follows.
        with_cp: Recompute blocks in the backward pass.
    """

    def __init__(
        self,
        make_dcn: Callable[[], nn.Module],
        channels: int,
        arch: Arch,
        drop_path_rates: Sequence[float],
        downsample: bool,
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.blocks = nn.ModuleList(
            Block(make_dcn(), channels, arch, rate) for rate in drop_path_rates
        )
        self.norm = nn.Identity() if arch.post_norm else _norm(channels)
        self.downsample = Downsample(channels) if downsample else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N, H, W, C) to the stage's map, of the same shape, and what the next stage gets."""
        for block in self.blocks:
            if self.with_cp and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        x = self.norm(x)
        return x, None if self.downsample is None else self.downsample(x)

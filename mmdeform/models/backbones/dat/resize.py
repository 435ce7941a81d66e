"""How feature maps are made smaller: the stem, between stages, and for keys.

Maps of any size are taken: everywhere the result has the size rounded up.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mmdeform.layers.layer_norm import LayerNorm2d

__all__ = ["FullConv2d", "downsample", "stem"]


class FullConv2d(nn.Conv2d):
    """A convolution of windows side by side; zeros at the right and the bottom fill the last."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        down, right = -height % self.stride[0], -width % self.stride[1]
        return super().forward(F.pad(x, (0, right, 0, down)) if down or right else x)


def stem(in_channels: int, dims: int, conv_stem: bool) -> nn.Sequential:
    """From the image to a quarter of its size: of patches (v1), or convolutions (DAT++)."""
    if not conv_stem:
        return nn.Sequential(FullConv2d(in_channels, dims, 4, 4), LayerNorm2d(dims))
    return nn.Sequential(
        nn.Conv2d(in_channels, dims // 2, 3, 2, 1),
        LayerNorm2d(dims // 2),
        nn.GELU(),
        nn.Conv2d(dims // 2, dims, 3, 2, 1),
        LayerNorm2d(dims),
    )


def downsample(in_channels: int, dims: int, conv_stem: bool) -> nn.Sequential:
    """Half the size, between two stages."""
    conv = (
        nn.Conv2d(in_channels, dims, 3, 2, 1, bias=False)
        if conv_stem
        else FullConv2d(in_channels, dims, 2, 2, bias=False)
    )
    return nn.Sequential(conv, LayerNorm2d(dims))

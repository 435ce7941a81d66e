"""Layer normalisation of maps whose channels come first."""

from torch import Tensor, nn

from mmdeform.registry import MODELS

__all__ = ["LN2d", "LayerNorm2d"]


class LayerNorm2d(nn.Module):
    """Normalises the channels of each pixel of (N, C, H, W).

    The parameters are those of an ``nn.LayerNorm`` called ``norm``, as published checkpoints of DAT
    have them.

    Args:
        channels: Number of channels C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to the same shape."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@MODELS.register_module()
class LN2d(nn.LayerNorm):
    """The same as a ``norm_cfg``: ``dict(type='mmdeform.LN2d')``.

    In mmcv's ``ConvModule`` its parameters are called ``ln``, as those of ``type='LN'``, which
    normalises channels that come last.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to the same shape."""
        # Contiguous, as mmcv's RoIAlign expects the maps that it pools from.
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()

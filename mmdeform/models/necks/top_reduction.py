"""The neck of detectors that read c4 and c5 of a dilated network.

Source: Dai et al., "R-FCN" (2016), https://arxiv.org/abs/1605.06409, and "Deformable Convolutional
Networks" (2017), https://arxiv.org/abs/1703.06211.
"""

from collections.abc import Sequence
from typing import Any

from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmdeform.registry import MODELS

__all__ = ["TopReduction"]


@MODELS.register_module()
class TopReduction(BaseModule):
    """Reduces the channels of the last map by a 1x1 convolution and ReLU; others stay as they are.

    Args:
        in_channels: Channels of the last map.
        out_channels: Channels that it gets: 1024 in R-FCN, 256 in Faster R-CNN.
        norm_cfg: Config of a normalisation between convolution and ReLU; the convolution then has
            no bias. Default: none, as in the papers.
        init_cfg: Of mmengine. Default: normal with standard deviation 0.01, as in the papers.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm_cfg: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg or dict(type="Normal", layer="Conv2d", std=0.01))
        # Not mmcv's ConvModule: it initialises its convolution itself.
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=norm_cfg is None)
        self.norm = build_norm_layer(norm_cfg, out_channels)[1] if norm_cfg else nn.Identity()

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Reduces the last map.

        Args:
            inputs: Feature maps, shape (N, C, H, W) each.

        Returns:
            As many maps; the last has shape (N, out_channels, H, W).
        """
        *others, top = inputs
        return *others, self.norm(self.conv(top)).relu()

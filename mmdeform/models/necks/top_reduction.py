"""The neck of detectors that read c4 and c5 of a dilated network.

Source: Dai et al., "R-FCN" (2016), https://arxiv.org/abs/1605.06409, and "Deformable Convolutional
Networks" (2017), https://arxiv.org/abs/1703.06211.
"""

from collections.abc import Sequence
from typing import Any

from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from torch import Tensor

from mmdeform.registry import MODELS

__all__ = ["TopReduction"]


@MODELS.register_module()
class TopReduction(BaseModule):
    """Reduces the channels of the last map by a 1x1 convolution and ReLU; others stay as they are.

    Args:
        in_channels: Channels of the last map.
        out_channels: Channels that it gets: 1024 in R-FCN, 256 in Faster R-CNN.
        init_cfg: Of mmengine. Default: normal with standard deviation 0.01, as in the papers.
        **kwargs: Of mmcv's ``ConvModule``, such as ``norm_cfg``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        init_cfg: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(init_cfg or dict(type="Normal", layer="Conv2d", std=0.01))
        self.conv = ConvModule(in_channels, out_channels, 1, inplace=False, **kwargs)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Reduces the last map.

        Args:
            inputs: Feature maps, shape (N, C, H, W) each.

        Returns:
            As many maps; the last has shape (N, out_channels, H, W).
        """
        *others, top = inputs
        return *others, self.conv(top)

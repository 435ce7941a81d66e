"""A region proposal network that tells classes apart: a detector of one stage.

Source: Dai et al., "Deformable Convolutional Networks" (2017), https://arxiv.org/abs/1703.06211,
where it serves to compare backbones; the authors' code does not contain it.
"""

from typing import Any

import torch.nn.functional as F
from mmdet.models.dense_heads import AnchorHead
from torch import Tensor, nn

from mmdeform.registry import MODELS

__all__ = ["ClassAwareRPNHead"]


@MODELS.register_module()
class ClassAwareRPNHead(AnchorHead):
    """mmdet's anchor head with the layers of an RPN and a score for each class.

    From the paper: the RPN of Faster R-CNN, whose two-class classifier becomes one of C + 1
    classes. Detections then are what every detector of one stage makes of scores and boxes: a
    threshold and NMS within each class. That boxes are common to all classes, as an RPN's are, is
    our reading.

    Args: those of mmdet's ``AnchorHead``, and
        num_classes: Classes C without the background.
        in_channels: Channels of the feature map.
        feat_channels: Channels of the 3x3 convolution. Default: 512.
        loss_cls: With ``use_sigmoid=True`` there are C independent scores instead. Default: softmax
            over C + 1 classes, the background last.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        feat_channels: int = 512,
        loss_cls: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_classes,
            in_channels,
            feat_channels=feat_channels,
            loss_cls=loss_cls or dict(type="CrossEntropyLoss", use_sigmoid=False),
            **kwargs,
        )

    def _init_layers(self) -> None:
        self.rpn_conv = nn.Conv2d(self.in_channels, self.feat_channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(
            self.feat_channels, self.num_base_priors * self.cls_out_channels, 1
        )
        self.rpn_reg = nn.Conv2d(
            self.feat_channels, self.num_base_priors * self.bbox_coder.encode_size, 1
        )

    def forward_single(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and box deltas of one level.

        Args:
            x: Feature map, shape (N, C, H, W).

        Returns:
            Logits, shape (N, anchors * scores, H, W), and deltas, shape (N, anchors * 4, H, W).
        """
        x = F.relu(self.rpn_conv(x))
        return self.rpn_cls(x), self.rpn_reg(x)

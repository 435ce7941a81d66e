"""The box head of R-FCN.

Source: Dai et al., "R-FCN" (2016), https://arxiv.org/abs/1605.06409, "Deformable Convolutional
Networks" (2017), https://arxiv.org/abs/1703.06211, and the authors' code of the latter,
https://github.com/msracver/Deformable-ConvNets; targets, losses and decoding are mmdet's.
"""

from typing import Any

import torch
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from torch import Tensor

from mmdeform.registry import MODELS

from .hard_examples import hardest
from .position_sensitive_vote import PositionSensitiveVote

__all__ = ["RFCNBBoxHead"]


@MODELS.register_module()
class RFCNBBoxHead(BBoxHead):
    """mmdet's box head on score maps: nothing is computed per RoI but its pooling.

    Scores and boxes are :class:`PositionSensitiveVote`, in the places of mmdet's linear layers.
    With ``mmdeform.DeformPSRoIPoolPack`` each class, the background too, moves its bins by offsets
    of its own, and all numbers of a box move theirs together. The background is the last class, as
    everywhere in mmdet; the authors' is the first. Class-agnostic boxes have 4 numbers; the
    authors' have 8, four of which, for the background, are not used.

    Args: those of mmdet's ``BBoxHead``, without those of its linear layers and their pooling, and
        in_channels: Channels of the feature map.
        roi_layer: Config of the pooling: ``type`` is ``mmdeform.DeformPSRoIPool`` or
            ``mmdeform.DeformPSRoIPoolPack``; ``output_size`` and other options of the layer.
        featmap_stride: Pixels of the image per pixel of the feature map.
        ohem: Online hard example mining: of each image only so many RoIs are learned from, those
            whose losses of class and box are largest in sum. All others have no part in the losses,
            which are averaged over what is left. The sampler should keep all proposals. Default:
            all that the sampler keeps.
        init_cfg: Of mmengine. Default: normal with standard deviation 0.01; offsets zero.

    Raises:
        ValueError: ``ohem`` is not positive, or ``roi_layer`` is another layer.
    """

    def __init__(
        self,
        in_channels: int,
        roi_layer: dict[str, Any],
        featmap_stride: int = 16,
        num_classes: int = 80,
        ohem: int | None = None,
        init_cfg: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if ohem is not None and ohem < 1:
            raise ValueError(f"ohem: expected a positive number of RoIs or None, got {ohem}")
        vote = dict(
            type=PositionSensitiveVote,
            roi_layer=dict(roi_layer, spatial_scale=1 / featmap_stride),
            offset_classes=1,
        )
        super().__init__(
            in_channels=in_channels,
            roi_feat_size=1,  # of what mmdet's linear layers would see
            num_classes=num_classes,
            cls_predictor_cfg=dict(vote, offset_classes=num_classes + 1),
            reg_predictor_cfg=vote,
            init_cfg=init_cfg or dict(type="Normal", layer="Conv2d", std=0.01),
            **kwargs,
        )
        self.ohem = ohem

    def forward(self, x: Tensor, rois: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts classes and boxes.

        Args:
            x: Feature map, shape (N, C, H, W).
            rois: (image index, x1, y1, x2, y2) in pixels of the image, shape (R, 5).

        Returns:
            Class scores, shape (R, num_classes + 1), the background last, and box deltas, shape
            (R, 4) or (R, 4 * num_classes).
        """
        return self.fc_cls(x, rois), self.fc_reg(x, rois)

    def loss(
        self,
        cls_score: Tensor,
        bbox_pred: Tensor,
        rois: Tensor,
        labels: Tensor,
        label_weights: Tensor,
        bbox_targets: Tensor,
        bbox_weights: Tensor,
        reduction_override: str | None = None,
    ) -> dict[str, Tensor]:
        """Losses over all RoIs or the hardest ones.

        Args: those of mmdet's ``BBoxHead.loss``.

        Returns:
            ``loss_cls``, ``loss_bbox`` and ``acc``. The losses depend on both predictions, also
            without RoIs, as training on several devices demands.
        """
        inputs = (cls_score, bbox_pred, rois, labels, label_weights, bbox_targets, bbox_weights)
        if self.ohem is not None and len(rois) > self.ohem:
            chosen = hardest(self._loss_of_each(*inputs), rois[:, 0], self.ohem)
            inputs = tuple(tensor[chosen] for tensor in inputs)
        losses = super().loss(*inputs, reduction_override=reduction_override)
        losses.setdefault("loss_cls", cls_score.sum())  # mmdet has none without RoIs
        return losses

    @torch.no_grad()
    def _loss_of_each(
        self, cls_score: Tensor, bbox_pred: Tensor, rois: Tensor, labels: Tensor, *targets: Tensor
    ) -> Tensor:
        """Loss of class and box of each RoI, shape (R,)."""
        losses = super().loss(
            cls_score, bbox_pred, rois, labels, *targets, reduction_override="none"
        )
        total = losses["loss_cls"].clone()
        positive = labels < self.num_classes
        if positive.any():
            of_boxes = losses["loss_bbox"]
            total[positive] += of_boxes.view(len(of_boxes), -1).sum(1)
        return total

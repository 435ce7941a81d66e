"""The RoI head of R-FCN.

Source: Dai et al., "R-FCN" (2016), https://arxiv.org/abs/1605.06409; the head is mmdet's.
"""

from collections.abc import Sequence
from typing import Any

from mmdet.models.roi_heads import StandardRoIHead
from torch import Tensor

from mmdeform.registry import MODELS

__all__ = ["RFCNRoIHead"]


@MODELS.register_module()
class RFCNRoIHead(StandardRoIHead):
    """mmdet's RoI head without an extractor: its box head pools score maps of its own.

    Args:
        bbox_head: Config of a box head that is called with a feature map and RoIs, such as
            ``mmdeform.RFCNBBoxHead``.
        in_index: Which of the neck's maps the box head reads. Default: the last.
        train_cfg: Assigner and sampler, as of mmdet's ``StandardRoIHead``.
        test_cfg: Score threshold, NMS and number of detections.
        init_cfg: Of mmengine.
    """

    def __init__(
        self,
        bbox_head: dict[str, Any],
        in_index: int = -1,
        train_cfg: dict[str, Any] | None = None,
        test_cfg: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            bbox_head=bbox_head, train_cfg=train_cfg, test_cfg=test_cfg, init_cfg=init_cfg
        )
        self.in_index = in_index

    def init_bbox_head(self, bbox_roi_extractor: None, bbox_head: dict[str, Any]) -> None:
        """Builds the box head; there is no extractor."""
        self.bbox_head = MODELS.build(bbox_head)

    def _bbox_forward(self, x: Sequence[Tensor], rois: Tensor) -> dict[str, Tensor]:
        cls_score, bbox_pred = self.bbox_head(x[self.in_index], rois)
        return dict(cls_score=cls_score, bbox_pred=bbox_pred)

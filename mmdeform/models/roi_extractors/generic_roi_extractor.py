"""Takes each RoI from all levels.

Source: Rossi et al., "A novel Region of Interest Extraction Layer for Instance Segmentation"
(2020), https://arxiv.org/abs/2004.13665; the extractor is mmdet's.
"""

from collections.abc import Sequence

from mmdet.models.roi_heads.roi_extractors import GenericRoIExtractor as MMDetGenericRoIExtractor
from torch import Tensor

from mmdeform.registry import MODELS

from .base import RegistryRoILayers, keep_graph

__all__ = ["GenericRoIExtractor"]


@MODELS.register_module()
class GenericRoIExtractor(RegistryRoILayers, MMDetGenericRoIExtractor):
    """mmdet's extractor for RoI layers of any registry.

    Args: those of mmdet's ``GenericRoIExtractor``; ``roi_layer.type`` may also be a name such as
        'mmdeform.DeformRoIPoolPack'. State dicts are mmdet's.
    """

    def forward(
        self, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None
    ) -> Tensor:
        """Pools every RoI from each level and sums or concatenates the results.

        Args:
            feats: Feature maps of the levels, shape (N, C, H, W).
            rois: (image index, x1, y1, x2, y2) in pixels of the image, shape (R, 5).
            roi_scale_factor: Scales the RoIs about their centres.

        Returns:
            Shape (R, C, Ph, Pw). It depends on every feature map and parameter, also without RoIs.
        """
        roi_feats = super().forward(feats, rois, roi_scale_factor)
        if len(rois) == 0:
            roi_feats = keep_graph(roi_feats, feats, self.parameters())
        return roi_feats

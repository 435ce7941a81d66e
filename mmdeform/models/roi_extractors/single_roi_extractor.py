"""Takes each RoI from the level that suits its size.

Source: Lin et al., "Feature Pyramid Networks for Object Detection" (2017),
https://arxiv.org/abs/1612.03144; the mapping to levels is mmdet's.
"""

from collections.abc import Sequence

from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor as MMDetSingleRoIExtractor
from torch import Tensor

from mmdeform.layers import DeformPSRoIPool, DeformRoIPool
from mmdeform.registry import MODELS

from .base import RegistryRoILayers, keep_graph

__all__ = ["SingleRoIExtractor"]


@MODELS.register_module()
class SingleRoIExtractor(RegistryRoILayers, MMDetSingleRoIExtractor):
    """mmdet's extractor for RoI layers of any registry.

    Deformable layers get the RoIs in the dtype in which they came: mmdet's own extractor casts them
    to that of the features, and in fp16 they would be off by up to half a pixel beyond 1024.

    Args: those of mmdet's ``SingleRoIExtractor``; ``roi_layer.type`` may also be a name such as
        'mmdeform.DeformRoIPoolPack'. State dicts are mmdet's.
    """

    def forward(
        self, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None
    ) -> Tensor:
        """Pools every RoI.

        Args:
            feats: Feature maps of the levels, shape (N, C, H, W).
            rois: (image index, x1, y1, x2, y2) in pixels of the image, shape (R, 5).
            roi_scale_factor: Scales the RoIs about their centres, after they were given to levels.

        Returns:
            Shape (R, C, Ph, Pw), dtype of the first feature map. It depends on every feature map
            and parameter, also where there is no RoI.
        """
        output_size = self.roi_layers[0].output_size
        roi_feats = feats[0].new_zeros(len(rois), self.out_channels, *output_size)
        levels = self.map_roi_levels(rois, len(feats))
        if roi_scale_factor is not None:
            rois = self.roi_rescale(rois, roi_scale_factor)
        for level, (feat, layer) in enumerate(zip(feats, self.roi_layers, strict=False)):
            chosen = (levels == level).nonzero().squeeze(1)
            if chosen.numel() == 0:  # mmcv's layers do not take that everywhere
                roi_feats = keep_graph(roi_feats, [feat], layer.parameters())
                continue
            own = rois[chosen]
            if not isinstance(layer, (DeformRoIPool, DeformPSRoIPool)):
                own = own.type_as(feat)
            roi_feats[chosen] = layer(feat, own).type_as(roi_feats)
        return roi_feats

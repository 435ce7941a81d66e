"""Takes each RoI from the level that suits its size.

Source: Lin et al., "Feature Pyramid Networks for Object Detection" (2017),
https://arxiv.org/abs/1612.03144; the mapping to levels is mmdet's.
"""

from collections.abc import Sequence
from typing import Any

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
        'mmdeform.DeformRoIPoolPack'. State dicts are mmdet's. And
        in_indices: Which of the neck's maps it reads, one per stride. Default: the first ones.

    Raises:
        ValueError: There are more or fewer maps to read than strides.
    """

    def __init__(
        self,
        roi_layer: dict[str, Any],
        out_channels: int,
        featmap_strides: Sequence[int],
        *args: Any,
        in_indices: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(roi_layer, out_channels, featmap_strides, *args, **kwargs)
        self.in_indices = None if in_indices is None else tuple(in_indices)
        if in_indices is not None and (
            len(in_indices) != len(featmap_strides) or min(in_indices) < 0
        ):
            raise ValueError(
                f"in_indices: expected an index from 0 on for each of featmap_strides="
                f"{featmap_strides}, got {in_indices}"
            )

    @property
    def num_inputs(self) -> int:
        """How many of the neck's maps it has to be given: RoI heads pass on the first so many."""
        return super().num_inputs if self.in_indices is None else max(self.in_indices) + 1

    def forward(
        self, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None
    ) -> Tensor:
        """Pools every RoI.

        Args:
            feats: The first ``num_inputs`` feature maps, shape (N, C, H, W) each.
            rois: (image index, x1, y1, x2, y2) in pixels of the image, shape (R, 5).
            roi_scale_factor: Scales the RoIs about their centres, after they were given to levels.

        Returns:
            Shape (R, C, Ph, Pw), dtype of the first feature map. It depends on every feature map
            and parameter, also where there is no RoI.
        """
        if self.in_indices is not None:
            feats = [feats[index] for index in self.in_indices]
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

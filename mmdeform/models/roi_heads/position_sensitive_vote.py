"""Predictions for regions that are made on the whole map, cell by cell, and then put to the vote.

Source: Dai et al., "R-FCN" (2016), https://arxiv.org/abs/1605.06409; with offsets "Deformable
Convolutional Networks" (2017), https://arxiv.org/abs/1703.06211.
"""

from typing import Any

from torch import Tensor, nn

from mmdeform.layers import DeformPSRoIPool, DeformPSRoIPoolPack

from ..roi_extractors.base import roi_layer_class

__all__ = ["PositionSensitiveVote"]


class PositionSensitiveVote(nn.Module):
    """A 1x1 convolution to score maps, position-sensitive pooling, and the mean of the bins.

    Each cell of the pooling's grid has a map of its own for each prediction, ``group_size**2`` in
    all; a bin of a RoI reads the map of its cell.

    Args:
        in_features: Channels of the features, C.
        out_features: Predictions per RoI, D.
        roi_layer: Config of the pooling layer without ``output_channels``; its ``type`` is
            ``mmdeform.DeformPSRoIPool``, which leaves bins where they are, or
            ``mmdeform.DeformPSRoIPoolPack``, which predicts offsets from the features.
        offset_classes: Groups of predictions with offsets of their own, where there are offsets.

    Raises:
        ValueError: ``roi_layer`` is another layer.
    """

    def __init__(
        self, in_features: int, out_features: int, roi_layer: dict[str, Any], offset_classes: int
    ) -> None:
        super().__init__()
        arguments = dict(roi_layer, output_channels=out_features)
        layer = roi_layer_class(arguments.pop("type"))
        if not issubclass(layer, DeformPSRoIPool):
            raise ValueError(
                "roi_layer.type: expected mmdeform.DeformPSRoIPool or mmdeform.DeformPSRoIPoolPack,"
                f" got {roi_layer['type']!r}"
            )
        if issubclass(layer, DeformPSRoIPoolPack):
            arguments.update(in_channels=in_features, num_classes=offset_classes)
        self.pool = layer(**arguments)
        self.conv = nn.Conv2d(in_features, out_features * self.pool.group_size**2, 1)

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        """Predicts for every RoI.

        Args:
            features: Shape (N, C, H, W).
            rois: (image index, x1, y1, x2, y2) in pixels of the image, shape (R, 5).

        Returns:
            Shape (R, D). It depends on the features and every parameter, also without RoIs.
        """
        inputs = [self.conv(features), rois]
        if isinstance(self.pool, DeformPSRoIPoolPack):
            inputs.append(features)
        return self.pool(*inputs).mean((2, 3))

"""Two-stage detectors that can be trained with R-CNN feature mimicking.

Source: Ren et al., "Faster R-CNN" (2015), https://arxiv.org/abs/1506.01497; He et al., "Mask R-CNN"
(2017), https://arxiv.org/abs/1703.06870; the detectors are mmdet's.
"""

from mmdet.models.detectors import FasterRCNN as MMDetFasterRCNN
from mmdet.models.detectors import MaskRCNN as MMDetMaskRCNN
from mmdet.structures import SampleList
from torch import Tensor

from mmdeform.models.roi_heads import MimickingRoIHead
from mmdeform.registry import MODELS

__all__ = ["FasterRCNN", "MaskRCNN"]


class _ShowsImages:
    """Shows the images to a RoI head that crops proposals out of them."""

    def loss(self, batch_inputs: Tensor, batch_data_samples: SampleList) -> dict[str, Tensor]:
        """Losses of RPN and RoI head.

        Args:
            batch_inputs: Images, shape (N, 3, H, W).
            batch_data_samples: Annotations of each image.

        Returns:
            Losses by name.
        """
        if not isinstance(self.roi_head, MimickingRoIHead):
            return super().loss(batch_inputs, batch_data_samples)
        with self.roi_head.watching(self, batch_inputs, batch_data_samples):
            return super().loss(batch_inputs, batch_data_samples)


@MODELS.register_module()
class FasterRCNN(_ShowsImages, MMDetFasterRCNN):
    """mmdet's Faster R-CNN, whose RoI head may be ``mmdeform.MimickingRoIHead``.

    Args: those of mmdet's ``FasterRCNN``. State dicts are mmdet's.
    """


@MODELS.register_module()
class MaskRCNN(_ShowsImages, MMDetMaskRCNN):
    """mmdet's Mask R-CNN, whose RoI head may be ``mmdeform.MimickingRoIHead``.

    Args: those of mmdet's ``MaskRCNN``. State dicts are mmdet's.
    """

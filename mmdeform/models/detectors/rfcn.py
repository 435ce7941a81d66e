"""R-FCN.

Source: Dai et al., "R-FCN: Object Detection via Region-based Fully Convolutional Networks" (2016),
https://arxiv.org/abs/1605.06409; "Deformable Convolutional Networks" (2017),
https://arxiv.org/abs/1703.06211.
"""

from mmdet.models.detectors import TwoStageDetector

from mmdeform.registry import MODELS

__all__ = ["RFCN"]


@MODELS.register_module()
class RFCN(TwoStageDetector):
    """mmdet's two-stage detector by its name; what makes it R-FCN is its RoI head.

    An ``mmdeform.RPNHead`` reads c4, an ``mmdeform.RFCNRoIHead`` the dilated c5, whose channels an
    ``mmdeform.TopReduction`` reduces. Deformable R-FCN has deformable convolutions in c5 and
    ``mmdeform.DeformPSRoIPoolPack`` in the RoI head.

    Args: those of mmdet's ``TwoStageDetector``.
    """

"""What a config builds beyond single layers: backbones, and mmdet's detectors with our modules.

The detectors and RoI extractors need mmdet; where only mmcv is installed, they are not here.
"""

import importlib.util

from .backbones import DAT, FlashInternImage, InternImage
from .transplant import Transplant

__all__ = ["DAT", "FlashInternImage", "InternImage", "Transplant"]

if importlib.util.find_spec("mmdet") is not None:
    from .dense_heads import ClassAwareRPNHead, RPNHead
    from .detectors import RFCN, DeformableDETR, FasterRCNN, MaskRCNN
    from .necks import TopReduction
    from .roi_extractors import GenericRoIExtractor, SingleRoIExtractor
    from .roi_heads import MimickingRoIHead, RFCNBBoxHead, RFCNRoIHead

    __all__ += [
        "RFCN", "ClassAwareRPNHead", "DeformableDETR", "FasterRCNN", "GenericRoIExtractor",
        "MaskRCNN", "MimickingRoIHead", "RFCNBBoxHead", "RFCNRoIHead", "RPNHead",
        "SingleRoIExtractor", "TopReduction",
    ]  # fmt: skip

"""What a config builds beyond single layers: backbones, and mmdet's detectors with our modules.

The detectors and RoI extractors need mmdet; where only mmcv is installed, they are not here.
"""

import importlib.util

from .backbones import DAT
from .transplant import Transplant

__all__ = ["DAT", "Transplant"]

if importlib.util.find_spec("mmdet") is not None:
    from .dense_heads import ClassAwareRPNHead, RPNHead
    from .detectors import RFCN, DeformableDETR
    from .necks import TopReduction
    from .roi_extractors import GenericRoIExtractor, SingleRoIExtractor
    from .roi_heads import RFCNBBoxHead, RFCNRoIHead

    __all__ += [
        "RFCN", "ClassAwareRPNHead", "DeformableDETR", "GenericRoIExtractor", "RFCNBBoxHead",
        "RFCNRoIHead", "RPNHead", "SingleRoIExtractor", "TopReduction",
    ]  # fmt: skip

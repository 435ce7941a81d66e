"""What a config builds beyond single layers: mmdet's detectors with modules from the registry.

The detectors and RoI extractors need mmdet; where only mmcv is installed, they are not here.
"""

import importlib.util

from .transplant import Transplant

__all__ = ["Transplant"]

if importlib.util.find_spec("mmdet") is not None:
    from .detectors import DeformableDETR
    from .roi_extractors import GenericRoIExtractor, SingleRoIExtractor

    __all__ += ["DeformableDETR", "GenericRoIExtractor", "SingleRoIExtractor"]

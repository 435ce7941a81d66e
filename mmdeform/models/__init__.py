"""What a config builds beyond single layers: mmdet's detectors with modules from the registry.

Needs mmdet; where only mmcv is installed, there is nothing here and the layers still work.
"""

import importlib.util

__all__: list[str] = []

if importlib.util.find_spec("mmdet") is not None:
    from .detectors import DeformableDETR
    from .roi_extractors import GenericRoIExtractor, SingleRoIExtractor

    __all__ += ["DeformableDETR", "GenericRoIExtractor", "SingleRoIExtractor"]

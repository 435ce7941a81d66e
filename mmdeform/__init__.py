"""Deformable operators for OpenMMLab.

``mmdeform.ops`` needs torch alone and is always there. The layers subclass mmcv's, so they are
registered when mmcv (with its operators) can be imported; without it the operators still work.
"""

import importlib.util
import warnings

from . import compat, ops
from .version import __version__

__all__ = ["__version__", "compat", "ops"]

if (
    importlib.util.find_spec("mmcv") is not None
    and importlib.util.find_spec("mmengine") is not None
):
    try:
        # Register the layers, and the FLOP formulas with mmengine's counter.
        from . import layers
        from .analysis import flops

        __all__ += ["flops", "layers"]
    except ImportError as error:
        warnings.warn(
            f"mmdeform: the layers are not registered because mmcv cannot be imported ({error}). "
            "`python -m mmdeform.doctor` tells how to fix it.",
            stacklevel=2,
        )

"""The registry of mmdeform's modules.

A child of mmengine's root registry: a config names a module ``type='mmdeform.DCNv2'``. mmengine
imports this file by its name the first time it meets the scope, and then ``locations``, so that the
string resolves with or without ``custom_imports``.
"""

from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

__all__ = ["MODELS"]

MODELS = Registry(
    "model",
    parent=MMENGINE_MODELS,
    scope="mmdeform",
    # mmdeform.analysis.flops registers no module: it brings FLOP counters to models of any config.
    locations=["mmdeform.layers", "mmdeform.models", "mmdeform.analysis.flops"],
)

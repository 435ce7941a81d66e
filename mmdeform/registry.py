"""The registries of mmdeform's modules.

Children of mmengine's root registries: a config names a module ``type='mmdeform.DCNv2'``. mmengine
imports this file by its name the first time it meets the scope, and then ``locations``, so that the
string resolves with or without ``custom_imports``.
"""

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import Registry

__all__ = ["HOOKS", "MODELS", "OPTIM_WRAPPER_CONSTRUCTORS"]

MODELS = Registry(
    "model",
    parent=MMENGINE_MODELS,
    scope="mmdeform",
    # mmdeform.analysis.flops registers no module: it brings FLOP counters to models of any config.
    locations=["mmdeform.layers", "mmdeform.models", "mmdeform.analysis.flops"],
)

HOOKS = Registry("hook", parent=MMENGINE_HOOKS, scope="mmdeform", locations=["mmdeform.engine"])

OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    "optimizer wrapper constructor",
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope="mmdeform",
    locations=["mmdeform.engine"],
)

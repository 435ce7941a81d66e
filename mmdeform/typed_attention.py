"""Attention classes of mmdet's transformers, chosen by the config.

mmdet's layers create their attention by fixed class names. With

    custom_imports = dict(imports=["mmdeform", "mmdeform.typed_attention"])

the configs ``self_attn_cfg``, ``cross_attn_cfg`` and ``cross_attn_text_cfg`` of all of them may
have a ``type``, like everything else in a config:

    self_attn_cfg=dict(type="mmdeform.MultiScaleDeformableAttention", embed_dims=256)

The type is any that a config may name, and is given the rest of the dict. A config without ``type``
builds what it always did. Importing this module enables it; :func:`disable` takes it back.
"""

from importlib import import_module
from typing import Any

from mmdet.registry import MODELS
from torch import nn

__all__ = ["disable", "enable"]

_PACKAGE = "mmdet.models.layers.transformer"
# The classes that mmdet's modules call by name, to create attention from a config.
_CREATED = {
    "conditional_detr_layers": ("ConditionalAttention",),
    "dab_detr_layers": ("ConditionalAttention",),
    "deformable_detr_layers": ("MultiheadAttention", "MultiScaleDeformableAttention"),
    "detr_layers": ("MultiheadAttention",),
    "grounding_dino_layers": ("MultiheadAttention", "MultiScaleDeformableAttention"),
}
# (module, name) -> the class before enable() and the one it put there.
_rebound: dict[tuple[str, str], tuple[type[nn.Module], type[nn.Module]]] = {}


def enable() -> None:
    """Lets attention configs of mmdet's transformer layers have a ``type``; any number of times."""
    for module_name, names in _CREATED.items():
        module = import_module(f"{_PACKAGE}.{module_name}")
        for name in names:
            if (module_name, name) not in _rebound:
                original = getattr(module, name)
                _rebound[module_name, name] = (original, _typed(original))
                setattr(module, name, _rebound[module_name, name][1])


def disable() -> None:
    """Takes :func:`enable` back; detectors that were built keep their attention."""
    while _rebound:
        (module_name, name), (original, typed) = _rebound.popitem()
        module = import_module(f"{_PACKAGE}.{module_name}")
        if getattr(module, name) is typed:  # or somebody else has rebound it since
            setattr(module, name, original)


def _typed(original: type[nn.Module]) -> type[nn.Module]:
    """A stand-in for a class: called with ``type``, it builds that; otherwise the class itself."""

    class Typed(original):  # type: ignore[misc, valid-type]
        def __new__(cls, *args: Any, **kwargs: Any) -> nn.Module:
            if cls is not Typed:  # somebody's subclass
                return super().__new__(cls)
            # Neither is an instance of this class, so that Python does not call __init__ again.
            if kwargs.get("type") is None:
                kwargs.pop("type", None)
                return original(*args, **kwargs)
            return MODELS.build(kwargs)

        @classmethod
        def __subclasshook__(cls, other: type) -> Any:
            # isinstance(module, <the rebound name>) means what it did. Not issubclass(), which asks
            # the subclasses of the original, and so this class again.
            return original in other.__mro__ if cls is Typed else NotImplemented

    Typed.__name__, Typed.__qualname__ = original.__name__, original.__qualname__
    Typed.__module__, Typed.__doc__ = original.__module__, original.__doc__
    return Typed


enable()

"""What a new module is told about the one that it replaces."""

import inspect
from collections.abc import Callable
from typing import Any

from mmcv.cnn.bricks import DropPath
from mmcv.cnn.bricks.transformer import MultiheadAttention
from mmcv.ops import MultiScaleDeformableAttention
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

__all__ = ["take_arguments"]

_UNKNOWN: Any = object()
# Arguments that change what a layer computes, and the value that stands for their absence.
_NEUTRAL = dict(
    stride=1,
    padding=0,
    output_padding=0,
    dilation=1,
    groups=1,
    padding_mode="zeros",
    batch_first=False,
)
# torch and mmcv have different names.
_ALIASES = dict(embed_dims="embed_dim", embed_dim="embed_dims")


def take_arguments(
    old: nn.Module, kind: Callable[..., nn.Module], given: dict[str, Any]
) -> dict[str, Any]:
    """Completes the arguments of a constructor from a module.

    Args:
        old: The module to be replaced. What it has as an attribute of an argument's name is taken.
        kind: Class, or function, that makes the new module.
        given: Arguments that are fixed already.

    Returns:
        All arguments. A given one that ``kind`` does not have is left out where its value means
        absence (``padding_mode='zeros'``).

    Raises:
        ValueError: A required argument is unknown, or one of the old module cannot be kept.
    """
    parameters, takes_any = _parameters(kind)
    arguments = dict(given)
    for name, parameter in parameters.items():
        if name in arguments:
            continue
        value = _value(old, name, kind)
        if value is not _UNKNOWN:
            arguments[name] = value
        elif parameter.default is parameter.empty:
            raise ValueError(
                f"{_name(kind)} needs {name!r}, of which {_name(type(old))} knows nothing; give it "
                f"in the rule: {name}=..."
            )
    for name, neutral in _NEUTRAL.items():
        if name in parameters or takes_any:
            continue
        if name in given:
            if _is(given[name], neutral):
                del arguments[name]
        elif not _is(_value(old, name, kind), neutral):
            raise ValueError(
                f"{_name(kind)} has no {name!r}, but {_name(type(old))} has {name}="
                f"{getattr(old, name)!r}; give {name}={neutral!r} in the rule to go without"
            )
    return arguments


def _parameters(kind: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """The named parameters of a constructor, and whether it takes others as well.

    As long as a class takes ``*args`` or ``**kwargs`` its base classes have a say.
    """
    if inspect.isclass(kind):
        inits = [vars(cls)["__init__"] for cls in kind.__mro__ if "__init__" in vars(cls)]
        signatures = [
            list(inspect.signature(init).parameters.values())[1:]  # without self
            for init in inits
            if init not in (nn.Module.__init__, object.__init__)
        ]
    else:
        signatures = [list(inspect.signature(kind).parameters.values())]
    parameters: dict[str, inspect.Parameter] = {}
    for signature in signatures:
        variadic = False
        for parameter in signature:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                variadic = True
            elif parameter.name not in ("device", "dtype"):
                parameters.setdefault(parameter.name, parameter)
        if not variadic:
            return parameters, False
    return parameters, bool(signatures)


def _value(old: nn.Module, name: str, kind: Callable[..., Any]) -> Any:
    """What the old module says about an argument, or _UNKNOWN."""
    if isinstance(old, MultiheadAttention) and name == "attn_drop":
        return old.attn.dropout
    if isinstance(old, MultiScaleDeformableAttention) and name == "value_proj_ratio":
        return old.value_proj.out_features / old.embed_dims
    if not hasattr(old, name):
        name = _ALIASES.get(name, name)
    value = getattr(old, name, _UNKNOWN)
    if name == "bias" and (value is None or isinstance(value, Tensor)):
        return value is not None
    if name == "padding" and isinstance(value, str):
        return _padding(value, kind)
    if name == "dropout_layer" and isinstance(value, nn.Module):
        return _dropout_layer(value)
    if isinstance(value, _DropoutNd):
        return value.p
    if isinstance(value, nn.Module):
        raise ValueError(
            f"the argument {name!r} of {_name(kind)} cannot be told from the module {name!r} of "
            f"{_name(type(old))}; give it in the rule: {name}=..."
        )
    return _UNKNOWN if callable(value) or isinstance(value, Tensor) else value


def _padding(value: str, kind: Callable[..., Any]) -> str | int:
    if inspect.isclass(kind) and issubclass(kind, _ConvNd):
        return value
    if value == "valid":
        return 0
    raise ValueError(f"padding={value!r} cannot be kept; give a number in the rule: padding=...")


def _dropout_layer(layer: nn.Module) -> dict[str, Any] | None:
    """The config of ``dropout_layer`` of mmcv's attention."""
    if isinstance(layer, nn.Identity):
        return None
    if isinstance(layer, _DropoutNd):
        return dict(type="Dropout", drop_prob=layer.p)
    if isinstance(layer, DropPath):
        return dict(type="DropPath", drop_prob=layer.drop_prob)
    raise ValueError(
        f"dropout_layer cannot be told from {_name(type(layer))}; give it in the rule: "
        "dropout_layer=dict(type=...)"
    )


def _is(value: Any, neutral: Any) -> bool:
    """True for a missing value, the neutral one, and a tuple of it."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    return all(v is _UNKNOWN or v == neutral for v in values)


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))

"""Which deformable operators modules use, by their classes and by what their methods call."""

import collections
import functools
import inspect
import types
from collections.abc import Iterable, Iterator
from typing import Any

import mmcv.ops
from mmcv.ops import deform_conv, modulated_deform_conv, multi_scale_deform_attn
from torch import nn

from mmdeform import layers, ops

__all__ = ["count_uses", "is_served_roi_align", "operators_in_source"]

# Modules that are an operator with its parameters; mmdeform's derive from mmcv's.
CLASSES: dict[type[nn.Module], str] = {
    mmcv.ops.DeformConv2d: "deform_conv2d",
    mmcv.ops.ModulatedDeformConv2d: "deform_conv2d",
    mmcv.ops.MultiScaleDeformableAttention: "ms_deform_attn",
    mmcv.ops.DeformRoIPool: "deform_roi_pool",
    layers.DeformPSRoIPool: "deform_ps_roi_pool",
    layers.DCNv3: "dcnv3",
    layers.DCNv4: "dcnv4",
    layers.DeformableAttention2d: "dat_attn",
}
# Functions that any other module may call.
FUNCTIONS: list[tuple[Any, str]] = [
    (deform_conv.deform_conv2d, "deform_conv2d"),
    (deform_conv.DeformConv2dFunction, "deform_conv2d"),
    (modulated_deform_conv.modulated_deform_conv2d, "deform_conv2d"),
    (modulated_deform_conv.ModulatedDeformConv2dFunction, "deform_conv2d"),
    (multi_scale_deform_attn.multi_scale_deformable_attn_pytorch, "ms_deform_attn"),
    (multi_scale_deform_attn.MultiScaleDeformableAttnFunction, "ms_deform_attn"),
    # The function hides the module of that name, and with it the autograd function.
    (mmcv.ops.deform_roi_pool, "deform_roi_pool"),
    (mmcv.ops.DeformRoIPool.forward.__globals__["DeformRoIPoolFunction"], "deform_roi_pool"),
    *((getattr(ops, name), name) for name in ops.__all__ if not name.endswith("_reference")),
]


def count_uses(
    modules: Iterable[nn.Module], package: str = ""
) -> collections.Counter[tuple[str, str]]:
    """Numbers of modules of classes in ``package`` by (operator, name of the class)."""
    counts = collections.Counter[tuple[str, str]]()
    for module in modules:
        for child in module.modules():
            operator = _operator(child)
            if operator is not None and type(child).__module__.startswith(package):
                counts[operator, type(child).__name__] += 1
    return counts


def _operator(module: nn.Module) -> str | None:
    """The operator that a module itself, not its children, uses."""
    for cls, operator in CLASSES.items():
        if isinstance(module, cls):
            return operator
    # mmcv's switchable atrous convolution is deformable on request.
    return _called_operator(type(module)) if getattr(module, "use_deform", True) else None


@functools.cache
def _called_operator(cls: type) -> str | None:
    """The operator that a method of ``cls`` calls by a global name."""
    for value in _globals_of_class(cls):
        for target, operator in FUNCTIONS:
            if value is target:
                return operator
    return None


def operators_in_source(cls: type) -> set[str]:
    """The operators that building or running ``cls`` may use, judged without building it.

    Follows the classes that methods name, within the package of ``cls``: more than a config asks
    for may be found, and what is chosen by a ``type=`` is not.
    """
    found, seen, waiting = set(), {cls}, [cls]
    while waiting:
        current = waiting.pop()
        operator = _called_operator(current)
        if operator is not None:
            found.add(operator)
        for value in _globals_of_class(current):
            if not inspect.isclass(value) or not issubclass(value, nn.Module) or value in seen:
                continue
            seen.add(value)
            operators = {name for base, name in CLASSES.items() if issubclass(value, base)}
            found |= operators
            if not operators and _package(value) == _package(cls):
                waiting.append(value)
    return found


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _globals_of_class(cls: type) -> Iterator[Any]:
    """The global objects that methods of ``cls`` refer to, inherited ones included."""
    for base in cls.__mro__:
        if base.__module__.startswith("torch."):
            continue
        for method in vars(base).values():
            function = inspect.unwrap(getattr(method, "__func__", method))
            if isinstance(function, types.FunctionType):
                yield from _globals(function.__code__, function.__globals__)


def _globals(code: types.CodeType, namespace: dict[str, Any]) -> Iterator[Any]:
    """The global objects that code may refer to, also by their modules: ``mmcv.ops.nms``."""
    for name in code.co_names:
        if name in namespace:
            yield from _members(namespace[name], code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):  # a function within
            yield from _globals(constant, namespace)


def _members(value: Any, names: tuple[str, ...]) -> Iterator[Any]:
    yield value
    if inspect.ismodule(value):
        for index, name in enumerate(names):
            if hasattr(value, name):
                yield from _members(getattr(value, name), names[index + 1 :])


def is_served_roi_align(module: nn.Module) -> bool:
    return isinstance(module, mmcv.ops.RoIAlign) and module.pool_mode == "avg" and module.aligned

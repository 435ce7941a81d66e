"""Lets every OpenMMLab model compute with this package's operators, by one line of config.

``custom_imports = dict(imports=['mmdeform.accelerate'])`` is all: the import calls :func:`enable`.
Configs, classes and state dicts stay as they are, for what is exchanged lies below them. It is
exchanged in place, so that names imported before or afterwards see it too:

- ``forward`` and ``backward`` of mmcv's autograd functions ``DeformConv2dFunction``,
  ``ModulatedDeformConv2dFunction``, ``MultiScaleDeformableAttnFunction``, ``DeformRoIPoolFunction``
  and ``RoIAlignFunction``, and
- the code of ``multi_scale_deformable_attn_pytorch``, which mmcv runs where it has no kernel.

mmcv's own implementation still serves what this package has no kernel for: other devices and
dtypes, and devices whose compiled library is missing. Only where mmcv has nothing either (its
attention kernel and its RoI pooling on the CPU) the reference stands in for a missing library.
RoIAlign is exchanged on the CPU, for averages with ``aligned=True`` over maps with enough RoIs.

With ``MMDEFORM_REQUIRE_EXT=1`` a missing library is an ImportError, here as everywhere.
"""

import functools
import importlib
import types
from collections.abc import Callable
from typing import Any

from mmengine.logging import print_log
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..ops import _library
from ._functions import REPLACEMENTS, Replacement

__all__ = ["disable", "enable", "is_enabled"]

# Under this name a replaced object keeps what mmcv had there: it outlives a reload of this module.
_STOCK = "_mmdeform_stock"


def _function(replacement: type[Replacement]) -> type[Function]:
    # import_module: mmcv.ops has functions of the same names as its modules.
    return getattr(importlib.import_module(f"mmcv.ops.{replacement.module}"), replacement.name)


def _attention() -> types.FunctionType:
    module = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
    return module.multi_scale_deformable_attn_pytorch


def _choosing(
    replacement: type[Replacement], function: type[Function]
) -> tuple[Callable[..., Tensor], Callable[..., Any]]:
    """``forward`` and ``backward`` that choose between ``replacement`` and mmcv's own."""
    stock_forward, stock_backward = function.forward, function.backward
    devices = replacement.devices  # torch.compile cannot read the attribute

    @functools.wraps(stock_forward)
    def forward(ctx: Any, *args: Any) -> Tensor:
        if args[0].device.type not in devices or not replacement.accepts(*args):
            return stock_forward(ctx, *args)
        # Where autograd looks for backward: it stays with what ran forward, whatever is switched
        # on or off in between.
        ctx._forward_cls = replacement
        return replacement.forward(ctx, *args)

    # Reached with contexts of mmcv's own forward, and by torch.compile.
    @once_differentiable
    @functools.wraps(stock_backward)
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        if ctx._forward_cls is replacement:
            return replacement.gradients(ctx, grad_output)
        return stock_backward(ctx, grad_output)

    return forward, backward


def _attention_code(
    value: Tensor,
    value_spatial_shapes: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    # Only the code is used: it runs as mmcv's function, among the names of mmcv's module.
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch as function

    from mmdeform.accelerate._functions import attention_in_pytorch

    return attention_in_pytorch(
        function._mmdeform_stock,
        value,
        value_spatial_shapes,
        sampling_locations,
        attention_weights,
    )


def is_enabled() -> bool:
    """Whether mmcv's functions use this package's operators."""
    return all(hasattr(owner, _STOCK) for owner in (*map(_function, REPLACEMENTS), _attention()))


def enable() -> None:
    """Lets mmcv's functions use this package's operators; harmless if they do already.

    Raises:
        ImportError: mmcv is missing, or was installed without its operators.
    """
    first = not is_enabled()
    disable()  # after a reload, what is there is older than this module
    for replacement in REPLACEMENTS:
        function = _function(replacement)
        setattr(function, _STOCK, {name: vars(function)[name] for name in ("forward", "backward")})
        forward, backward = _choosing(replacement, function)
        function.forward, function.backward = staticmethod(forward), staticmethod(backward)
    attention = _attention()
    stock = types.FunctionType(attention.__code__, attention.__globals__, attention.__name__)
    setattr(attention, _STOCK, stock)
    # Not the attribute of the module: other projects import the function by its name.
    attention.__code__ = _attention_code.__code__
    if first:
        print_log(f"mmdeform.accelerate: {_report()}", logger="current")


def disable() -> None:
    """Gives mmcv its own functions back, the same objects.

    Results that were computed before keep their backward pass.
    """
    for replacement in REPLACEMENTS:
        function = _function(replacement)
        if hasattr(function, _STOCK):
            for name, method in getattr(function, _STOCK).items():
                setattr(function, name, method)
            delattr(function, _STOCK)
    attention = _attention()
    if hasattr(attention, _STOCK):
        attention.__code__ = getattr(attention, _STOCK).__code__
        delattr(attention, _STOCK)


def _report() -> str:
    """One line on what is replaced, and where."""
    names = [
        replacement.name + (" (cpu)" if replacement.devices == ("cpu",) else "")
        for replacement in REPLACEMENTS
    ]
    devices = []
    for device, status in _library.status().items():
        if status.loaded:
            devices.append(f"mmdeform's {status.capability} kernels on {device}")
        elif status.problem is not None:
            devices.append(f"mmcv's own, where it has one, on {device} ({status.problem})")
    return f"mmcv's {', '.join(names)} and {_attention().__name__} run {'; '.join(devices)}"


enable()

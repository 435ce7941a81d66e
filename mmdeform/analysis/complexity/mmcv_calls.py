"""Shows a counter what mmcv computes: its own operators pass by torch's dispatcher.

mmcv's deformable operators and its RoIAlign are counted by the formulas of their counterparts in
``mmdeform.ops``, on every device and whichever kernels run, mmcv's or, with
``mmdeform.accelerate``, ours. All other compiled functions of mmcv are noted as not counted.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from .counter import FlopCounter
from .exchange import exchanged

__all__ = ["watch_mmcv"]


def _conv(call: dict[str, Any], output: Tensor) -> tuple:
    # mmcv reads no more of larger offsets than the output has pixels.
    offset, mask = (*call["offset"].shape[:2], *output.shape[2:]), call.get("mask")
    mask_shape = None if mask is None else mask.shape
    return call["input"].shape, offset, mask_shape, call["weight"].shape


def _attend(call: dict[str, Any], output: Tensor) -> tuple:
    return call["value"].shape, None, None, call["sampling_locations"].shape


def _roi_pool(call: dict[str, Any], output: Tensor) -> tuple:
    ratio = max(call["sampling_ratio"], 0)  # mmcv takes any ratio below one for an adaptive grid
    size = tuple(output.shape[2:])
    return call["input"].shape, call["rois"].shape, None, None, size, call["spatial_scale"], ratio


@dataclass(frozen=True)
class _Call:
    """A function of mmcv that is counted.

    Attributes:
        module, name: Where it is, below ``mmcv.ops``; of an autograd function its ``forward``.
        label: Under which name it is counted.
        operator: Of ``mmdeform.ops``, by whose formula it is counted.
        arguments: What that formula wants to know of a call and its output.
    """

    module: str
    name: str
    label: str
    operator: str
    arguments: Callable[[dict[str, Any], Tensor], tuple]


_ATTENTION = ("mmcv.ms_deform_attn", "ms_deform_attn", _attend)
_CALLS = (
    _Call("deform_conv", "DeformConv2dFunction", "mmcv.deform_conv2d", "deform_conv2d", _conv),
    _Call(
        "modulated_deform_conv",
        "ModulatedDeformConv2dFunction",
        "mmcv.deform_conv2d",
        "deform_conv2d",
        _conv,
    ),
    _Call("multi_scale_deform_attn", "MultiScaleDeformableAttnFunction", *_ATTENTION),
    _Call("multi_scale_deform_attn", "multi_scale_deformable_attn_pytorch", *_ATTENTION),
    _Call(
        "deform_roi_pool",
        "DeformRoIPoolFunction",
        "mmcv.deform_roi_pool",
        "deform_roi_pool",
        _roi_pool,
    ),
    _Call("roi_align", "RoIAlignFunction", "mmcv.roi_align", "deform_roi_pool", _roi_pool),
)


@contextmanager
def watch_mmcv(counter: FlopCounter) -> Iterator[None]:
    """Lets ``counter`` see mmcv's operators while the block runs; what they compute stays.

    Args:
        counter: Runs in the same block.
    """
    with ExitStack() as stack:
        for call in _CALLS:
            # import_module: mmcv.ops has functions of the same names as its modules.
            module = importlib.import_module(f"mmcv.ops.{call.module}")
            function = getattr(module, call.name)
            if inspect.isclass(function):
                forward = staticmethod(_counted(counter, call, function.forward))
                stack.enter_context(exchanged(function, "forward", forward))
            else:
                counted = _counted(counter, call, function)
                stack.enter_context(exchanged(module, call.name, counted))
        extension = importlib.import_module("mmcv._ext")
        for name, function in vars(extension).items():
            if isinstance(function, BuiltinFunctionType):
                missed = _missed(counter, name, function)
                stack.enter_context(exchanged(extension, name, missed))
        yield


def _counted(counter: FlopCounter, call: _Call, function: Callable) -> Callable:
    signature = inspect.signature(function)
    formula = flop_registry[getattr(torch.ops.mmdeform, call.operator)]

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Tensor:
        with counter.paused():
            output = function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        counter.add(call.label, formula, *call.arguments(bound.arguments, output))
        return output

    return run


def _missed(counter: FlopCounter, name: str, function: Callable) -> Callable:
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        counter.miss(f"mmcv.{name}")
        return function(*args, **kwargs)

    return run

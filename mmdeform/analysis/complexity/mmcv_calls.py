"""Shows a counter what mmcv computes: its own operators pass by torch's dispatcher.

mmcv's deformable operators are counted by the formulas of their counterparts in ``mmdeform.ops``,
on every device and whichever kernels run, mmcv's or, with ``mmdeform.accelerate``, ours. All other
compiled functions of mmcv are noted as not counted.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
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


def _attention(call: dict[str, Any], output: Tensor) -> tuple:
    return call["value"].shape, None, None, call["sampling_locations"].shape


def _roi_pool(call: dict[str, Any], output: Tensor) -> tuple:
    ratio = max(call["sampling_ratio"], 0)  # mmcv takes any ratio below one for an adaptive grid
    size = tuple(output.shape[2:])
    return call["input"].shape, call["rois"].shape, None, None, size, call["spatial_scale"], ratio


# Module of mmcv.ops, name in it, operator of ours, what its formula wants to know of a call.
_CALLS: tuple[tuple[str, str, str, Callable[[dict[str, Any], Tensor], tuple]], ...] = (
    ("deform_conv", "DeformConv2dFunction", "deform_conv2d", _conv),
    ("modulated_deform_conv", "ModulatedDeformConv2dFunction", "deform_conv2d", _conv),
    ("multi_scale_deform_attn", "MultiScaleDeformableAttnFunction", "ms_deform_attn", _attention),
    ("multi_scale_deform_attn", "multi_scale_deformable_attn_pytorch", "ms_deform_attn", _attention),
    ("deform_roi_pool", "DeformRoIPoolFunction", "deform_roi_pool", _roi_pool),
)  # fmt: skip


@contextmanager
def watch_mmcv(counter: FlopCounter) -> Iterator[None]:
    """Lets ``counter`` see mmcv's operators while the block runs; what they compute stays.

    Args:
        counter: Runs in the same block.
    """
    with ExitStack() as stack:
        for module_name, name, operator, arguments in _CALLS:
            # import_module: mmcv.ops has functions of the same names as its modules.
            module = importlib.import_module(f"mmcv.ops.{module_name}")
            owner = getattr(module, name)
            counted = partial(_counted, counter, operator, arguments)
            if inspect.isclass(owner):
                forward = staticmethod(counted(owner.forward))
                stack.enter_context(exchanged(owner, "forward", forward))
            else:
                stack.enter_context(exchanged(module, name, counted(owner)))
        extension = importlib.import_module("mmcv._ext")
        for name, function in vars(extension).items():
            if isinstance(function, BuiltinFunctionType):
                missed = _missed(counter, name, function)
                stack.enter_context(exchanged(extension, name, missed))
        yield


def _counted(
    counter: FlopCounter, operator: str, arguments: Callable[..., tuple], function: Callable
) -> Callable:
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        with counter.paused():
            output = function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        formula = flop_registry[getattr(torch.ops.mmdeform, operator)]
        counter.add(f"mmcv.{operator}", formula, *arguments(bound.arguments, output))
        return output

    return call


def _missed(counter: FlopCounter, name: str, function: Callable) -> Callable:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        counter.miss(f"mmcv.{name}")
        return function(*args, **kwargs)

    return call

"""Calls of mmcv's functions, and results with and without this package's operators."""

import importlib
from collections.abc import Callable
from typing import Any

import mmcv.ops
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmdeform import accelerate

ATTENTION = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
# Taken before anything is replaced, as modules that are imported earlier do.
DEFORM_CONV2D = mmcv.ops.deform_conv2d
MODULATED_DEFORM_CONV2D = mmcv.ops.modulated_deform_conv2d
DEFORM_ROI_POOL = mmcv.ops.deform_roi_pool
ROI_ALIGN = mmcv.ops.roi_align
MS_DEFORM_ATTN = ATTENTION.MultiScaleDeformableAttnFunction.apply
MS_DEFORM_ATTN_PYTORCH = ATTENTION.multi_scale_deformable_attn_pytorch

SHAPES = [(6, 5), (3, 2)]
STARTS = [0, 30]

Leaves = dict[str, Tensor]


class Calls(TorchDispatchMode):
    """Keeps the arguments of every call of this package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "mmdeform":
            name = function._schema.name.removeprefix("mmdeform::")
            self.arguments.append((name, args))
        return function(*args, **kwargs or {})

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.arguments]


def results(function: Callable[..., Tensor], leaves: Leaves) -> list[Tensor]:
    """The output and the gradients of all leaves."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    with torch.backends.cudnn.flags(allow_tf32=False):
        output = function(**leaves)
        weights = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
        gradients = torch.autograd.grad((output * weights).sum(), list(leaves.values()))
    return [output, *gradients]


def compare(function: Callable[..., Tensor], leaves: Leaves, *operators: str) -> None:
    """Compares outputs and gradients with mmcv's; only ``operators`` must have been called."""
    accelerate.disable()
    with Calls() as calls:
        expected = results(function, leaves)
    assert not calls.names
    accelerate.enable()
    with Calls() as calls:
        actual = results(function, leaves)
    assert calls.names == list(operators)
    assert expected[0].abs().max() > 0.05
    tolerance = 1e-10 if expected[0].dtype == torch.float64 else 1e-4
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def random(*shape: int, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
    """Normal numbers, the same on all devices and, rounded, in all dtypes."""
    return torch.randn(shape, dtype=torch.float64).to(device, dtype)


def convolution_leaves(mask: bool = False, deform_groups: int = 2, **kind: Any) -> Leaves:
    """Two groups, stride (1, 2), padding (1, 2), dilation (2, 1)."""
    leaves = dict(
        input=random(3, 8, 9, 10, **kind),
        offset=random(3, 18 * deform_groups, 7, 6, **kind),
        weight=random(6, 4, 3, 3, **kind),
    )
    if mask:
        leaves["mask"] = random(3, 9 * deform_groups, 7, 6, **kind).sigmoid()
    return leaves


def deform_conv2d(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    return DEFORM_CONV2D(input, offset, weight, (1, 2), (1, 2), (2, 1), 2, 2)


def modulated_deform_conv2d(
    input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None
) -> Tensor:
    geometry = ((1, 2), (1, 2), (2, 1), 2, 2)
    return MODULATED_DEFORM_CONV2D(input, offset, mask, weight, bias, *geometry)


def attention_leaves(**kind: Any) -> Leaves:
    """Two images, 36 tokens, four heads of 8 channels, 7 queries, two levels, three points."""
    return dict(
        value=random(2, 36, 4, 8, **kind),
        locations=random(2, 7, 4, 2, 3, 2, **kind) * 0.4 + 0.5,
        weights=random(2, 7, 4, 2, 3, **kind).sigmoid(),
    )


def ms_deform_attn_pytorch(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    shapes = torch.tensor(SHAPES, device=value.device)
    return MS_DEFORM_ATTN_PYTORCH(value, shapes, locations, weights)


def ms_deform_attn(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    shapes = torch.tensor(SHAPES, device=value.device)
    starts = torch.tensor(STARTS, device=value.device)
    return MS_DEFORM_ATTN(value, shapes, starts, locations, weights, 64)


def make_rois(count: int = 12, images: int = 2, size: int = 40, **kind: Any) -> Tensor:
    """RoIs in a square image of ``size`` pixels; some reach beyond it."""
    corner, extent = torch.rand(2, count, 2, dtype=torch.float64) * size
    index = torch.arange(count, dtype=torch.float64)[:, None] % images
    rois = torch.cat([index, corner - 5, corner + 0.7 * extent], 1)
    return rois.to(kind.get("device", "cpu"), kind.get("dtype", torch.float32))

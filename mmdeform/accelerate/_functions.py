"""What stands in for mmcv's functions."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.utils import _pair

from ..layers.sampling import as_mmcv_reads
from ..ops import _library, ms_deform_attn
from ..ops.deform_conv2d import output_size

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# The kernels bring the map to channels last first. Where a bin has more pixels than this (the few
# RoIs of a mask branch on the finest level; masks that mmdet crops by RoIAlign), that takes longer
# than all of mmcv's RoIAlign.
ROI_ALIGN_PIXELS_PER_BIN = 16


def _has_kernels(tensor: Tensor) -> bool:
    """True if a compiled library computes with ``tensor``."""
    status = _library.status().get(tensor.device.type)
    return status is not None and status.loaded and tensor.dtype in DTYPES


def _run(operator: Callable[..., Any], tensor: Tensor, *args: Any) -> Any:
    """Calls an operator in the dtypes of its arguments, for mmcv's casts are done already."""
    if not torch.is_autocast_enabled(tensor.device.type):
        return operator(tensor, *args)
    with torch.autocast(tensor.device.type, enabled=False):
        return operator(tensor, *args)


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def _coordinates(data: Tensor, *coordinates: Tensor) -> tuple[Tensor, ...]:
    """Brings coordinates to one dtype that the operators take beside ``data``; fp32 stays fp32."""
    dtype = _library.accumulation_dtype(data.dtype)
    if {tensor.dtype for tensor in coordinates} in ({data.dtype}, {dtype}):
        return coordinates
    return tuple(tensor.to(dtype) for tensor in coordinates)


class Replacement(Function):
    """What one of mmcv's autograd functions does where :meth:`accepts` its arguments.

    ``forward`` leaves in ``ctx`` what mmcv's leaves there, except that buffers and empty tensors
    that stand for absent ones are missing.
    """

    module: ClassVar[str]
    """Of mmcv.ops."""
    name: ClassVar[str]
    """Of mmcv's function."""
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    """Types of devices for which :meth:`accepts` is asked at all."""

    @staticmethod
    def accepts(*args: Any) -> bool:
        """Whether ``forward`` is for these arguments."""
        raise NotImplementedError

    @staticmethod
    def gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the arguments of ``forward``."""
        raise NotImplementedError

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return ctx._forward_cls.gradients(ctx, grad_output)


def _keep_convolution(
    ctx: Any, input: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, deform: int
) -> None:
    if input.dim() != 4:
        raise ValueError(f"Expected 4D tensor as input, got {input.dim()}D tensor instead.")
    ctx.stride, ctx.padding, ctx.dilation = _pair(stride), _pair(padding), _pair(dilation)
    ctx.groups, ctx.deform_groups, ctx.device = groups, deform, input.device.type


def _convolution(ctx: Any) -> tuple:
    return ctx.stride, ctx.padding, ctx.dilation, ctx.groups, ctx.deform_groups


class _DeformConv2d(Replacement):
    """All tensors are brought to the dtype of ``offset``, by mmcv's rule."""

    module = "deform_conv"
    name = "DeformConv2dFunction"

    @staticmethod
    def accepts(input: Tensor, offset: Tensor, *_: Any) -> bool:
        return _has_kernels(offset)

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = False,
        im2col_step: int = 32,
    ) -> Tensor:
        _keep_convolution(ctx, input, stride, padding, dilation, groups, deform_groups)
        assert bias is False, "Only support bias is False."
        ctx.im2col_step = im2col_step
        input, weight = input.type_as(offset), weight.type_as(offset)
        ctx.save_for_backward(input, offset, weight)
        operator = torch.ops.mmdeform.deform_conv2d
        return _run(operator, input, offset, None, weight, None, *_convolution(ctx))

    @staticmethod
    def gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, offset, weight = ctx.saved_tensors
        grad_input, grad_offset, _, grad_weight = torch.ops.mmdeform.deform_conv2d_backward(
            grad_output, input, offset, None, weight, *_convolution(ctx), _deterministic()
        )
        return grad_input, grad_offset, grad_weight, *(None,) * 7


class _ModulatedDeformConv2d(Replacement):
    """All tensors are brought to the dtype of ``offset``, by mmcv's rule.

    mmdet's DyHead brings offsets of a map larger than the output. mmcv does not compare sizes;
    detectors were trained with what it reads of them.
    """

    module = "modulated_deform_conv"
    name = "ModulatedDeformConv2dFunction"
    accepts = staticmethod(_DeformConv2d.accepts)

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        offset: Tensor,
        mask: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        deform_groups: int = 1,
    ) -> Tensor:
        _keep_convolution(ctx, input, stride, padding, dilation, groups, deform_groups)
        ctx.with_bias = bias is not None
        input, mask, weight = input.type_as(offset), mask.type_as(offset), weight.type_as(offset)
        bias = None if bias is None else bias.type_as(offset)
        ctx.save_for_backward(input, offset, mask, weight)
        size = output_size(input.shape[2:], weight.shape[2:], *_convolution(ctx)[:3])
        offset, mask = as_mmcv_reads(offset, size), as_mmcv_reads(mask, size)
        operator = torch.ops.mmdeform.deform_conv2d
        return _run(operator, input, offset, mask, weight, bias, *_convolution(ctx))

    @staticmethod
    def gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, offset, mask, weight = ctx.saved_tensors
        read = [as_mmcv_reads(tensor, grad_output.shape[2:]) for tensor in (offset, mask)]
        grad_input, grad_offset, grad_mask, grad_weight = torch.ops.mmdeform.deform_conv2d_backward(
            grad_output, input, *read, weight, *_convolution(ctx), _deterministic()
        )
        grad_offset, grad_mask = _as_large(grad_offset, offset), _as_large(grad_mask, mask)
        grad_bias = grad_output.sum((0, 2, 3)) if ctx.with_bias else None
        return grad_input, grad_offset, grad_mask, grad_weight, grad_bias, *(None,) * 5


def _as_large(gradient: Tensor, map: Tensor) -> Tensor:
    """The gradient of ``map`` from that of what ``as_mmcv_reads`` took of it."""
    if gradient.shape == map.shape:
        return gradient
    unread = map.shape[1:].numel() - gradient.shape[1:].numel()
    return functional.pad(gradient.flatten(1), (0, unread)).view(map.shape)


class _MultiScaleDeformableAttn(Replacement):
    """The result has the dtype of ``value``, as in mmcv; fp32 locations and weights stay fp32."""

    module = "multi_scale_deform_attn"
    name = "MultiScaleDeformableAttnFunction"

    @staticmethod
    def accepts(value: Tensor, *_: Any) -> bool:
        return _has_kernels(value) or value.device.type == "cpu"

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int = 64,
    ) -> Tensor:
        ctx.im2col_step = im2col_step
        levels = (value_spatial_shapes, value_level_start_index)
        tensors = (value, *levels, *_coordinates(value, sampling_locations, attention_weights))
        ctx.save_for_backward(*tensors)
        return _run(torch.ops.mmdeform.ms_deform_attn, *tensors)

    @staticmethod
    def gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_value, grad_locations, grad_weights = torch.ops.mmdeform.ms_deform_attn_backward(
            grad_output, *ctx.saved_tensors, _deterministic()
        )
        return grad_value, None, None, grad_locations, grad_weights, None


def _keep_pooling(
    ctx: Any, rois: Tensor, output_size: Any, spatial_scale: float, sampling_ratio: int
) -> None:
    assert rois.size(1) == 5, "RoI must be (idx, x1, y1, x2, y2)!"
    ctx.output_size = _pair(output_size)
    ctx.spatial_scale, ctx.sampling_ratio = float(spatial_scale), int(sampling_ratio)


def _pooling(ctx: Any) -> tuple:
    # mmcv takes any ratio below one for an adaptive grid.
    return ctx.output_size, ctx.spatial_scale, max(ctx.sampling_ratio, 0)


class _DeformRoIPool(Replacement):
    """The result has the dtype of ``input``; RoIs and fp32 offsets stay fp32."""

    module = "deform_roi_pool"
    name = "DeformRoIPoolFunction"

    @staticmethod
    def accepts(input: Tensor, *_: Any) -> bool:
        return _has_kernels(input) or input.device.type == "cpu"

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        rois: Tensor,
        offset: Tensor | None,
        output_size: int | Sequence[int],
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
    ) -> Tensor:
        _keep_pooling(ctx, rois, output_size, spatial_scale, sampling_ratio)
        ctx.gamma = float(gamma)
        if offset is not None:
            # mmcv also takes an empty tensor for "no offsets".
            offset = _coordinates(input, offset)[0] if offset.dim() == 4 else None
        rois = rois.to(_library.accumulation_dtype(input.dtype))
        ctx.save_for_backward(input, rois, offset)
        operator = torch.ops.mmdeform.deform_roi_pool
        return _run(operator, input, rois, offset, None, *_pooling(ctx), ctx.gamma)

    @staticmethod
    def gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, rois, offset = ctx.saved_tensors
        grad_input, grad_offset, _ = torch.ops.mmdeform.deform_roi_pool_backward(
            grad_output, input, rois, offset, None, *_pooling(ctx), ctx.gamma, _deterministic()
        )
        return grad_input, None, None if offset is None else grad_offset, *(None,) * 4


class _RoIAlign(Replacement):
    """Averages with ``aligned=True`` are deformable RoI pooling without offsets."""

    module = "roi_align"
    name = "RoIAlignFunction"
    devices = ("cpu",)  # nobody has measured yet that it would be faster on a GPU

    @staticmethod
    def accepts(
        input: Tensor,
        rois: Tensor,
        output_size: int | Sequence[int],
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        pool_mode: str = "avg",
        aligned: bool = True,
    ) -> bool:
        if pool_mode != "avg" or not aligned:
            return False
        images, _, height, width = input.shape
        bins = rois.shape[0] * math.prod(_pair(output_size))
        if bins * ROI_ALIGN_PIXELS_PER_BIN < images * height * width or not _has_kernels(input):
            return False
        # On the CPU mmcv refuses RoIs of negative size, and goes on doing so.
        return torch.compiler.is_compiling() or bool((rois[:, 3:] >= rois[:, 1:3]).all())

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        rois: Tensor,
        output_size: int | Sequence[int],
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        pool_mode: str = "avg",
        aligned: bool = True,
    ) -> Tensor:
        _keep_pooling(ctx, rois, output_size, spatial_scale, sampling_ratio)
        ctx.pool_mode, ctx.aligned, ctx.input_shape = 1, aligned, input.size()
        rois = rois.to(_library.accumulation_dtype(input.dtype))
        ctx.save_for_backward(rois)
        operator = torch.ops.mmdeform.deform_roi_pool
        return _run(operator, input, rois, None, None, *_pooling(ctx), 0.0)

    @staticmethod
    def gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (rois,) = ctx.saved_tensors
        # The gradient depends on the size of the input alone, which mmcv does not keep either.
        input = grad_output.new_zeros(()).expand(ctx.input_shape)
        grad_input, _, _ = torch.ops.mmdeform.deform_roi_pool_backward(
            grad_output, input, rois, None, None, *_pooling(ctx), 0.0, _deterministic()
        )
        return grad_input, *(None,) * 6


REPLACEMENTS: tuple[type[Replacement], ...] = (
    _DeformConv2d,
    _ModulatedDeformConv2d,
    _MultiScaleDeformableAttn,
    _DeformRoIPool,
    _RoIAlign,
)


def attention_in_pytorch(
    stock: Callable[..., Tensor],
    value: Tensor,
    value_spatial_shapes: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Stands in for mmcv's ``multi_scale_deformable_attn_pytorch``, ``stock``.

    The result has the dtype of ``value``; under autocast it is fp32 at least, as in mmcv, where
    autocast makes grid_sample compute in fp32.
    """
    exporting = torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()
    if exporting or not _has_kernels(value):
        return stock(value, value_spatial_shapes, sampling_locations, attention_weights)
    shapes = torch.as_tensor(value_spatial_shapes, dtype=torch.long, device=value.device)
    # As mmcv; on a GPU it would wait for the device, and the kernel only minds too few tokens.
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        tokens = int(shapes.prod(1).sum())
        if value.shape[1] != tokens:
            raise RuntimeError(
                f"value: expected S = {tokens} tokens for value_spatial_shapes {shapes.tolist()}, "
                f"got {value.shape[1]}"
            )
    if torch.is_autocast_enabled(value.device.type):
        value = value.to(torch.promote_types(value.dtype, torch.float32))
    return _run(ms_deform_attn, value, shapes, None, sampling_locations, attention_weights)

"""Deformable RoI pooling, v1 (arXiv 1703.06211) and modulated, v2 (arXiv 1811.11168)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._library import (
    accumulation_dtype,
    autocast_tensor,
    reference_gradients,
    register,
    register_autocast,
    register_gradient,
)
from ._roi import (
    axis_corners,
    check_rois,
    check_size,
    finite_or_zero,
    image_indices,
    keep_graph,
    padded_images,
    sum_of_samples,
)

# Positions contribute up to one pixel outside, as in RoIAlign.
MARGIN = 1


def _axis_samples(
    start: Tensor,
    extent: Tensor,
    bins: Tensor,
    bin_count: int,
    offset: Tensor | None,
    size: int,
    sampling_ratio: int,
    gamma: float,
) -> tuple[Tensor, float]:
    """Sampling positions of one RoI along one axis.

    Args:
        start: Where the RoI begins, in pixels of the feature map; a scalar.
        extent: Its width or height in pixels; a scalar.
        bins: Index of each bin along the axis, shape (Ph, Pw).
        bin_count: Bins along the axis.
        offset: Offset of each bin relative to ``gamma * extent``, shape (Ph, Pw), or None.
        size: Pixels of the feature map along the axis.
        sampling_ratio: Samples per bin; 0: as many as keep them at most one pixel apart.
        gamma: Scale of the offsets.

    Returns:
        Positions (Ph, Pw, S) in pixels and the number of samples of a bin. S is smaller than that
        number where an adaptive grid reaches far beyond the image: only the samples that may
        contribute are looked at. Samples that do not exist are NaN.
    """
    bin_size = extent / bin_count
    samples = float(sampling_ratio) if sampling_ratio > 0 else bin_size.ceil().item()
    begin = start + bins * bin_size
    if offset is not None:
        begin = begin + finite_or_zero(gamma * extent) * offset
    # More than half a pixel lies between the samples of an adaptive grid.
    visited = samples if sampling_ratio > 0 else min(samples, 2 * size + 8)
    if not math.isfinite(samples) or visited <= 0:
        return begin[..., None].expand(*begin.shape, 0), samples
    first = torch.zeros_like(begin)
    if visited < samples:
        first = ((-MARGIN - begin.detach()) / (bin_size / samples)).floor() - 2
        first = first.clamp(0, samples - visited)
    index = first[..., None] + torch.arange(int(visited), device=begin.device)
    return begin[..., None] + (index + 0.5) * bin_size / samples, samples


def deform_roi_pool_reference(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    output_size: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> Tensor:
    """The specification of :func:`deform_roi_pool`; every argument is required."""
    _, channels, height, width = input.shape
    dtype = accumulation_dtype(input.dtype)
    bins_h, bins_w = output_size
    rows = torch.arange(bins_h, device=input.device)[:, None].expand(bins_h, bins_w)
    columns = torch.arange(bins_w, device=input.device).expand(bins_h, bins_w)
    images = padded_images(input.to(dtype), classes=1, cells=1)
    output = input.new_zeros(rois.shape[0], channels, bins_h, bins_w, dtype=dtype)
    pooled = []
    for roi, image in enumerate(image_indices(rois, input.shape[0])):
        corners = rois[roi, 1:].detach().to(dtype) * spatial_scale - 0.5
        x1, y1, x2, y2 = corners
        offset_x, offset_y = (None, None) if offset is None else offset[roi].to(dtype)
        y, samples_y = _axis_samples(
            y1, y2 - y1, rows, bins_h, offset_y, height, sampling_ratio, gamma
        )
        x, samples_x = _axis_samples(
            x1, x2 - x1, columns, bins_w, offset_x, width, sampling_ratio, gamma
        )
        total = sum_of_samples(
            images(image),
            width,
            torch.zeros_like(rows),
            axis_corners(y[None], height, MARGIN),
            axis_corners(x[None], width, MARGIN),
        )
        count = samples_y * samples_x
        pooled.append(total[0] / (count if count > 1 else 1))
    if pooled:
        output = torch.stack(pooled)
    if mask is not None:
        output = output * mask.to(dtype)[:, None]
    return keep_graph(output, input, offset).to(input.dtype).contiguous()


def _backward_reference(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    output_size: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    def function(input: Tensor, offset: Tensor | None, mask: Tensor | None) -> Tensor:
        return deform_roi_pool_reference(
            input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma
        )

    return reference_gradients(function, grad_output, (input, offset, mask))


def _fake(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    output_size: Sequence[int],
    *args: Any,
) -> Tensor:
    return input.new_empty(rois.shape[0], input.shape[1], *output_size)


def _backward_fake(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    *args: Any,
) -> tuple[Tensor, ...]:
    return tuple(
        grad_output.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)
        for tensor in (input, offset, mask)
    )


def _counts(
    input_shape: Any, rois_shape: Any, output_size: Sequence[int], sampling_ratio: int
) -> tuple[int, int]:
    """Number of output values and of sampled values.

    The number of samples of an adaptive grid depends on the RoIs: it is counted as 2 x 2.
    """
    outputs = rois_shape[0] * input_shape[1] * output_size[0] * output_size[1]
    return outputs, outputs * (sampling_ratio or 2) ** 2


def _flops(
    input_shape: Any,
    rois_shape: Any,
    offset_shape: Any,
    mask_shape: Any,
    output_size: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    *_: Any,
    **__: Any,
) -> int:
    """Four multiply-adds per sampled value; the mean, and the mask, per output value."""
    outputs, samples = _counts(input_shape, rois_shape, output_size, sampling_ratio)
    return 8 * samples + (1 if mask_shape is None else 2) * outputs


def _backward_flops(
    _: Any,
    input_shape: Any,
    rois_shape: Any,
    offset_shape: Any,
    mask_shape: Any,
    output_size: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    *__: Any,
    **___: Any,
) -> int:
    """Per sampled value four multiply-adds to scatter, and four to correlate if offsets or masks
    get gradients; the mean, and the mask, per output value."""
    outputs, samples = _counts(input_shape, rois_shape, output_size, sampling_ratio)
    correlates = offset_shape is not None or mask_shape is not None
    return (16 if correlates else 8) * samples + (1 if mask_shape is None else 2) * outputs


register(
    "deform_roi_pool(Tensor input, Tensor rois, Tensor? offset, Tensor? mask, int[] output_size, "
    "float spatial_scale, int sampling_ratio, float gamma) -> Tensor",
    reference=deform_roi_pool_reference,
    fake=_fake,
    flops=_flops,
)
register(
    "deform_roi_pool_backward(Tensor grad_output, Tensor input, Tensor rois, Tensor? offset, "
    "Tensor? mask, int[] output_size, float spatial_scale, int sampling_ratio, float gamma, "
    "bool deterministic) -> (Tensor grad_input, Tensor grad_offset, Tensor grad_mask)",
    reference=_backward_reference,
    fake=_backward_fake,
    flops=_backward_flops,
)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, rois, offset, mask, *ctx.geometry = inputs
    ctx.save_for_backward(input, rois, offset, mask)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing refuses a second time
    _, _, offset, mask = saved
    grad_input, grad_offset, grad_mask = torch.ops.mmdeform.deform_roi_pool_backward(
        grad_output,
        *saved,
        *ctx.geometry,
        torch.are_deterministic_algorithms_enabled(),
    )
    return (
        grad_input,
        None,
        None if offset is None else grad_offset,
        None if mask is None else grad_mask,
        *(None,) * 4,
    )


register_gradient("deform_roi_pool", _backward, _setup_context)


def _autocast(
    dtype: torch.dtype,
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    *geometry: Any,
) -> tuple:
    # Offsets that are still in fp32 keep their precision; they only need one dtype with the mask.
    first = mask if offset is None else offset
    coordinate_dtype = dtype if first is not None and first.dtype == dtype else torch.float32
    return (
        autocast_tensor(input, dtype),
        autocast_tensor(rois, torch.float32),
        autocast_tensor(offset, coordinate_dtype),
        autocast_tensor(mask, coordinate_dtype),
        *geometry,
    )


register_autocast("deform_roi_pool", _autocast)


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None = None,
    output_size: int | Sequence[int] = (7, 7),
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable RoI pooling: each bin of a region of interest is moved by its own offset.

    A RoI becomes ``x1 * spatial_scale - 0.5`` and so on in pixels of ``input``, without rounding
    or smallest size, and is divided into Ph x Pw bins. A bin is moved by ``gamma`` times the RoI's
    size times its offset and averaged over a grid of bilinear samples at the centres of equal
    cells. A sample with row < -1 or row > H, or likewise for columns, counts as zero; any other is
    clamped to the image. So do NaN and infinite positions count as zero, with a zero gradient.
    The gradient of the offsets is the true one: zero where a sample was clamped, right-sided at
    integer positions. Without offsets this is RoIAlign (aligned). Positions and sums are computed
    in fp32 (fp64 for fp64 input).

    Args:
        input: Shape (N, C, H, W); fp64, fp32, fp16 or bf16.
        rois: Shape (R, 5): index of the image and (x1, y1, x2, y2) in image pixels; converted to
            fp32 (fp64 for fp64 input). Gets no gradient. R may be 0.
        offset: Shape (R, 2, Ph, Pw): (x, y) of each bin, in units of ``gamma`` times the RoI's
            width and height; dtype of ``input`` or fp32. None: bins stay where they are.
        output_size: Bins, one integer or (Ph, Pw).
        spatial_scale: Pixels of ``input`` per pixel of the image, e.g. 1 / 8.
        sampling_ratio: Samples per bin and axis; 0: ceil(RoI size / bins), at most one pixel
            apart, and none in RoIs with x2 <= x1 or y2 <= y1, which then give zeros.
        gamma: Scale of the offsets.
        mask: Modulation, shape (R, Ph, Pw), used as it is (the sigmoid is the caller's); dtype as
            ``offset``. None: v1, no modulation.

    Returns:
        Shape (R, C, Ph, Pw), dtype of ``input``, contiguous.

    Raises:
        ValueError: A shape, dtype or device does not fit; names the argument.
        RuntimeError: An image index in ``rois`` lies outside [0, N) (ValueError from the
            reference; the CUDA kernel stops the program).

    Source: Dai et al., https://arxiv.org/abs/1703.06211; Zhu et al.,
    https://arxiv.org/abs/1811.11168. Layout of ``mmcv.ops.deform_roi_pool``.
    """
    output_size = check_size(output_size, "output_size")
    check_rois(input, rois, offset=offset, mask=mask)
    if not isinstance(sampling_ratio, int) or sampling_ratio < 0:
        raise ValueError(f"sampling_ratio: expected an integer >= 0, got {sampling_ratio}")
    expected = (rois.shape[0], 2, *output_size)
    if offset is not None and offset.shape != expected:
        raise ValueError(
            f"offset: expected shape (R, 2, Ph, Pw) = {tuple(expected)}, got {tuple(offset.shape)}"
        )
    expected = (rois.shape[0], *output_size)
    if mask is not None and mask.shape != expected:
        raise ValueError(
            f"mask: expected shape (R, Ph, Pw) = {tuple(expected)}, got {tuple(mask.shape)}"
        )
    dtype = accumulation_dtype(input.dtype)
    coordinate_dtypes = {tensor.dtype for tensor in (offset, mask) if tensor is not None}
    if len(coordinate_dtypes) > 1 or not coordinate_dtypes <= {input.dtype, dtype}:
        offset = None if offset is None else offset.to(dtype)
        mask = None if mask is None else mask.to(dtype)
    return torch.ops.mmdeform.deform_roi_pool(
        input,
        rois.to(dtype),
        offset,
        mask,
        output_size,
        float(spatial_scale),
        sampling_ratio,
        float(gamma),
    )

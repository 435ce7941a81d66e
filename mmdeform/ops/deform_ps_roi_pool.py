"""Deformable position-sensitive RoI pooling of R-FCN (arXiv 1703.06211)."""

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
    round_half_away,
    sum_of_samples,
)

# Positions contribute up to the outer edges of the first and the last pixel.
MARGIN = 0.5


def _axis_positions(
    start: Tensor,
    end: Tensor,
    bins: Tensor,
    bin_count: int,
    offset: Tensor | None,
    samples: int,
    trans_std: float,
) -> Tensor:
    """Sampling positions of one RoI along one axis.

    Args:
        start: Where the RoI begins, in pixels of the feature map; a scalar.
        end: Where it ends; a scalar.
        bins: Index of each bin along the axis, shape (Ph, Pw).
        bin_count: Bins along the axis.
        offset: Offset of each bin relative to ``trans_std`` times the RoI's size, shape
            (K, Ph, Pw), or None.
        samples: Samples of a bin.
        trans_std: Scale of the offsets.

    Returns:
        Positions in pixels, shape (K, Ph, Pw, S); K is 1 without offsets.
    """
    extent = (end - start).clamp(min=0.1)
    bin_size = extent / bin_count
    begin = (start + bins * bin_size)[None]
    if offset is not None:
        begin = begin + offset * trans_std * finite_or_zero(extent)
    return begin[..., None] + torch.arange(samples, device=start.device) * (bin_size / samples)


def deform_ps_roi_pool_reference(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: Sequence[int],
    spatial_scale: float,
    output_dim: int,
    group_size: int,
    part_size: int,
    sample_per_part: int,
    trans_std: float,
) -> Tensor:
    """The specification of :func:`deform_ps_roi_pool`; every argument is required."""
    _, _, height, width = input.shape
    dtype = accumulation_dtype(input.dtype)
    bins_h, bins_w = output_size
    classes = 1 if offset is None else offset.shape[1] // 2
    rows = torch.arange(bins_h, device=input.device)[:, None].expand(bins_h, bins_w)
    columns = torch.arange(bins_w, device=input.device).expand(bins_h, bins_w)
    cell = rows * group_size // bins_h * group_size + columns * group_size // bins_w
    part_y, part_x = rows * part_size // bins_h, columns * part_size // bins_w
    images = padded_images(input.to(dtype), classes, group_size**2)
    output = input.new_zeros(rois.shape[0], output_dim, bins_h, bins_w, dtype=dtype)
    pooled = []
    for roi, image in enumerate(image_indices(rois, input.shape[0])):
        x1, y1, x2, y2 = round_half_away(rois[roi, 1:].detach().to(dtype))
        offset_x = offset_y = None
        if offset is not None:
            of_bins = offset[roi].to(dtype)[:, part_y, part_x]  # (2 * K, Ph, Pw)
            offset_x, offset_y = of_bins[0::2], of_bins[1::2]
        x = _axis_positions(
            x1 * spatial_scale - 0.5, (x2 + 1) * spatial_scale - 0.5,
            columns, bins_w, offset_x, sample_per_part, trans_std,
        )  # fmt: skip
        y = _axis_positions(
            y1 * spatial_scale - 0.5, (y2 + 1) * spatial_scale - 0.5,
            rows, bins_h, offset_y, sample_per_part, trans_std,
        )  # fmt: skip
        y_corners, x_corners = axis_corners(y, height, MARGIN), axis_corners(x, width, MARGIN)
        total = sum_of_samples(images(image), width, cell, y_corners, x_corners)
        count = y_corners[0].sum(-1) * x_corners[0].sum(-1)
        pooled.append((total / count.clamp(min=1)[:, None]).flatten(0, 1))
    if pooled:
        output = torch.stack(pooled)
    return keep_graph(output, input, offset).to(input.dtype).contiguous()


def _backward_reference(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: Sequence[int],
    spatial_scale: float,
    output_dim: int,
    group_size: int,
    part_size: int,
    sample_per_part: int,
    trans_std: float,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    def function(input: Tensor, offset: Tensor | None) -> Tensor:
        return deform_ps_roi_pool_reference(
            input, rois, offset, output_size, spatial_scale, output_dim, group_size, part_size,
            sample_per_part, trans_std,
        )  # fmt: skip

    return reference_gradients(function, grad_output, (input, offset))


def _fake(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: Sequence[int],
    spatial_scale: float,
    output_dim: int,
    *args: Any,
) -> Tensor:
    return input.new_empty(rois.shape[0], output_dim, *output_size)


def _backward_fake(
    grad_output: Tensor, input: Tensor, rois: Tensor, offset: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    return tuple(
        grad_output.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)
        for tensor in (input, offset)
    )


def _counts(
    rois_shape: Any, output_size: Sequence[int], output_dim: int, sample_per_part: int
) -> tuple[int, int]:
    """Number of output values and of sampled values."""
    outputs = rois_shape[0] * output_dim * output_size[0] * output_size[1]
    return outputs, outputs * sample_per_part**2


def _flops(
    input_shape: Any,
    rois_shape: Any,
    offset_shape: Any,
    output_size: Sequence[int],
    spatial_scale: float,
    output_dim: int,
    group_size: int,
    part_size: int,
    sample_per_part: int,
    *_: Any,
    **__: Any,
) -> int:
    """Four multiply-adds per sampled value; the mean per output value."""
    outputs, samples = _counts(rois_shape, output_size, output_dim, sample_per_part)
    return 8 * samples + outputs


def _backward_flops(
    _: Any,
    input_shape: Any,
    rois_shape: Any,
    offset_shape: Any,
    output_size: Sequence[int],
    spatial_scale: float,
    output_dim: int,
    group_size: int,
    part_size: int,
    sample_per_part: int,
    *__: Any,
    **___: Any,
) -> int:
    """Per sampled value four multiply-adds to scatter, and four to correlate if offsets get
    gradients; the mean per output value."""
    outputs, samples = _counts(rois_shape, output_size, output_dim, sample_per_part)
    return (8 if offset_shape is None else 16) * samples + outputs


register(
    "deform_ps_roi_pool(Tensor input, Tensor rois, Tensor? offset, int[] output_size, "
    "float spatial_scale, int output_dim, int group_size, int part_size, int sample_per_part, "
    "float trans_std) -> Tensor",
    reference=deform_ps_roi_pool_reference,
    fake=_fake,
    flops=_flops,
)
register(
    "deform_ps_roi_pool_backward(Tensor grad_output, Tensor input, Tensor rois, Tensor? offset, "
    "int[] output_size, float spatial_scale, int output_dim, int group_size, int part_size, "
    "int sample_per_part, float trans_std, bool deterministic) "
    "-> (Tensor grad_input, Tensor grad_offset)",
    reference=_backward_reference,
    fake=_backward_fake,
    flops=_backward_flops,
)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, rois, offset, *ctx.geometry = inputs
    ctx.save_for_backward(input, rois, offset)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing refuses a second time
    grad_input, grad_offset = torch.ops.mmdeform.deform_ps_roi_pool_backward(
        grad_output,
        *saved,
        *ctx.geometry,
        torch.are_deterministic_algorithms_enabled(),
    )
    return (grad_input, None, None if saved[2] is None else grad_offset, *(None,) * 7)


register_gradient("deform_ps_roi_pool", _backward, _setup_context)


def _autocast(
    dtype: torch.dtype, input: Tensor, rois: Tensor, offset: Tensor | None, *geometry: Any
) -> tuple:
    # Offsets that are still in fp32 keep their precision.
    coordinate_dtype = dtype if offset is not None and offset.dtype == dtype else torch.float32
    return (
        autocast_tensor(input, dtype),
        autocast_tensor(rois, torch.float32),
        autocast_tensor(offset, coordinate_dtype),
        *geometry,
    )


register_autocast("deform_ps_roi_pool", _autocast)


def _check_numbers(**numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {number}")


def deform_ps_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: int | Sequence[int],
    spatial_scale: float,
    output_dim: int,
    group_size: int,
    part_size: int,
    sample_per_part: int,
    trans_std: float,
) -> Tensor:
    """Deformable position-sensitive RoI pooling: each bin reads its own channels, at its offset.

    A RoI is rounded to whole pixels of the image (halves away from zero) and becomes
    ``x1 * spatial_scale - 0.5`` to ``(x2 + 1) * spatial_scale - 0.5``, at least 0.1 wide and high,
    in pixels of ``input``. Bin (ph, pw) of output channel c reads input channel
    ``(c * group_size + gh) * group_size + gw`` with ``gh = ph * group_size // Ph``. Its samples
    lie where its equal cells begin, moved by ``trans_std`` times the RoI's size times its offset.
    Samples outside [-0.5, W - 0.5] or [-0.5, H - 0.5], and NaN, are left out; the others are
    clamped to the image, sampled bilinearly and averaged. A bin without samples gives zero. The
    gradient of the offsets is zero where a sample was clamped and right-sided at integer
    positions. Positions and sums are computed in fp32 (fp64 for fp64 input).

    Args:
        input: Shape (N, output_dim * group_size**2, H, W); fp64, fp32, fp16 or bf16.
        rois: Shape (R, 5): index of the image and (x1, y1, x2, y2) in image pixels; converted to
            fp32 (fp64 for fp64 input). Gets no gradient. R may be 0.
        offset: Shape (R, 2 * K, part_size, part_size): (x, y) of each of K classes and each part,
            in units of ``trans_std`` times the RoI's width and height; K divides ``output_dim``;
            dtype of ``input`` or fp32. None: bins stay where they are (``no_trans``).
        output_size: Bins, one integer or (Ph, Pw).
        spatial_scale: Pixels of ``input`` per pixel of the image, e.g. 1 / 16.
        output_dim: Output channels; consecutive ``output_dim / K`` of them form a class.
        group_size: Position-sensitive cells per axis.
        part_size: Offsets per axis; bin ph has the offset of part ``ph * part_size // Ph``.
        sample_per_part: Samples per bin and axis.
        trans_std: Scale of the offsets.

    Returns:
        Shape (R, output_dim, Ph, Pw), dtype of ``input``, contiguous.

    Raises:
        ValueError: A shape, dtype or device does not fit; names the argument.
        RuntimeError: An image index in ``rois`` lies outside [0, N) (ValueError from the
            reference; the CUDA kernel stops the program).

    Source: Dai et al., https://arxiv.org/abs/1703.06211, and the authors' operator
    DeformablePSROIPooling, https://github.com/msracver/Deformable-ConvNets.
    """
    output_size = check_size(output_size, "output_size")
    check_rois(input, rois, offset=offset)
    _check_numbers(output_dim=output_dim, group_size=group_size, part_size=part_size,
                   sample_per_part=sample_per_part)  # fmt: skip
    if input.shape[1] != output_dim * group_size**2:
        raise ValueError(
            f"input: expected output_dim * group_size**2 = {output_dim * group_size**2} channels, "
            f"got {tuple(input.shape)}"
        )
    if offset is not None:
        if (
            offset.dim() != 4
            or offset.shape[0] != rois.shape[0]
            or offset.shape[2:] != (part_size, part_size)
        ):
            raise ValueError(
                f"offset: expected shape (R, 2*K, part_size, part_size) = "
                f"({rois.shape[0]}, 2*K, {part_size}, {part_size}), got {tuple(offset.shape)}"
            )
        classes = offset.shape[1] // 2
        if offset.shape[1] % 2 != 0 or classes == 0 or output_dim % classes != 0:
            raise ValueError(
                f"offset: expected 2*K channels with K dividing output_dim = {output_dim}, "
                f"got {tuple(offset.shape)}"
            )
    dtype = accumulation_dtype(input.dtype)
    if offset is not None and offset.dtype not in (input.dtype, dtype):
        offset = offset.to(dtype)
    return torch.ops.mmdeform.deform_ps_roi_pool(
        input,
        rois.to(dtype),
        offset,
        output_size,
        float(spatial_scale),
        output_dim,
        group_size,
        part_size,
        sample_per_part,
        float(trans_std),
    )

"""Deformable convolution, v1 (arXiv 1703.06211) and modulated, v2 (arXiv 1811.11168)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._arguments import pair
from ._bilinear import bilinear_corners, with_zero_pixel
from ._library import (
    AUTOCAST_KEYS,
    accumulation_dtype,
    autocast_tensor,
    reference_gradients,
    register,
    register_autocast,
    register_gradient,
)


def output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Output (height, width) in pixels of a convolution over an input of ``size``."""
    height, width = (
        (s + 2 * p - d * (k - 1) - 1) // st + 1
        for s, k, st, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True)
    )
    return height, width


def sampling_positions(
    offset: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Where a deformable convolution samples its input.

    Args:
        offset: (N, D*T*2, Ho, Wo) as in :func:`deform_conv2d`.
        kernel_size: (Kh, Kw); T = Kh * Kw taps in row-major order.
        stride: (vertical, horizontal) in input pixels, as are ``padding`` and ``dilation``.
        padding: See ``stride``.
        dilation: See ``stride``.

    Returns:
        Row and column coordinates in input pixels, each (N, D, T, Ho, Wo), dtype of ``offset``.
    """
    taps = kernel_size[0] * kernel_size[1]
    batch, channels, out_h, out_w = offset.shape
    offset = offset.reshape(batch, channels // (2 * taps), taps, 2, out_h, out_w)
    grids = []
    for axis, out in enumerate((out_h, out_w)):
        start = torch.arange(out, device=offset.device) * stride[axis] - padding[axis]
        tap = torch.arange(kernel_size[axis], device=offset.device) * dilation[axis]
        grids.append((tap[:, None] + start).to(offset.dtype))  # (K, out)
    base_y = grids[0][:, None, :, None].expand(*kernel_size, out_h, out_w).flatten(0, 1)
    base_x = grids[1][None, :, None, :].expand(*kernel_size, out_h, out_w).flatten(0, 1)
    return offset[:, :, :, 0] + base_y, offset[:, :, :, 1] + base_x


def deform_conv2d_reference(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    deform_groups: int,
) -> Tensor:
    """The specification of :func:`deform_conv2d`; every argument is required."""
    batch, channels, height, width = input.shape
    out_channels, _, *kernel_size = weight.shape
    out_h, out_w = offset.shape[2:]
    dtype = accumulation_dtype(input.dtype)
    pixels = input.to(dtype).reshape(
        batch, deform_groups, channels // deform_groups, height * width
    )
    pixels = with_zero_pixel(pixels, 3)
    y, x = sampling_positions(offset.to(dtype), kernel_size, stride, padding, dilation)
    columns: Any = 0
    for index, corner_weight in bilinear_corners(y, x, height, width):
        index = index.flatten(2)[:, :, None].expand(-1, -1, pixels.shape[2], -1)
        columns = columns + pixels.gather(3, index) * corner_weight.flatten(2)[:, :, None]
    if mask is not None:
        columns = columns * mask.to(dtype).reshape(columns[:, :, :1].shape)
    filters = weight.to(dtype).reshape(groups, out_channels // groups, -1)
    columns = columns.reshape(batch, *filters.shape[::2], out_h * out_w)  # (N, G, C/G*T, Ho*Wo)
    output = torch.einsum("gok,ngkp->ngop", filters, columns)
    output = output.reshape(batch, out_channels, out_h, out_w)
    if bias is not None:
        output = output + bias.to(dtype)[:, None, None]
    return output.to(input.dtype).contiguous()


def _backward_reference(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    deform_groups: int,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    def function(input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor) -> Tensor:
        return deform_conv2d_reference(
            input, offset, mask, weight, None, stride, padding, dilation, groups, deform_groups
        )

    return reference_gradients(function, grad_output, (input, offset, mask, weight))


def _fake(input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, *args: Any) -> Tensor:
    return input.new_empty(input.shape[0], weight.shape[0], *offset.shape[2:])


def _backward_fake(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    *args: Any,
) -> tuple[Tensor, ...]:
    return tuple(
        grad_output.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)
        for tensor in (input, offset, mask, weight)
    )


def _counts(input_shape: Any, offset_shape: Any, weight_shape: Any) -> tuple[int, int]:
    """Multiply-adds of the matrix product and number of sampled values."""
    out_channels, group_channels, kernel_h, kernel_w = weight_shape
    pixels = offset_shape[0] * offset_shape[2] * offset_shape[3]
    taps = kernel_h * kernel_w
    return pixels * out_channels * group_channels * taps, pixels * input_shape[1] * taps


def _flops(
    input_shape: Any, offset_shape: Any, mask_shape: Any, weight_shape: Any, *_: Any, **__: Any
) -> int:
    """The convolution's product, and per sampled value four multiply-adds (five with a mask)."""
    macs, samples = _counts(input_shape, offset_shape, weight_shape)
    return 2 * macs + (8 if mask_shape is None else 10) * samples


def _backward_flops(
    _: Any, input_shape: Any, offset_shape: Any, mask_shape: Any, weight_shape: Any, *__: Any,
    **___: Any,
) -> int:  # fmt: skip
    """Two products; per value four multiply-adds each to resample, to correlate and to scatter."""
    macs, samples = _counts(input_shape, offset_shape, weight_shape)
    return 4 * macs + (24 if mask_shape is None else 26) * samples


register(
    "deform_conv2d(Tensor input, Tensor offset, Tensor? mask, Tensor weight, Tensor? bias, "
    "int[] stride, int[] padding, int[] dilation, int groups, int deform_groups) -> Tensor",
    reference=deform_conv2d_reference,
    fake=_fake,
    flops=_flops,
)
register(
    "deform_conv2d_backward(Tensor grad_output, Tensor input, Tensor offset, Tensor? mask, "
    "Tensor weight, int[] stride, int[] padding, int[] dilation, int groups, int deform_groups, "
    "bool deterministic) -> (Tensor grad_input, Tensor grad_offset, Tensor grad_mask, "
    "Tensor grad_weight)",
    reference=_backward_reference,
    fake=_backward_fake,
    flops=_backward_flops,
)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, offset, mask, weight, bias, *ctx.geometry = inputs
    ctx.save_for_backward(input, offset, mask, weight)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing refuses a second time
    grad_input, grad_offset, grad_mask, grad_weight = torch.ops.mmdeform.deform_conv2d_backward(
        grad_output,
        *saved,
        *ctx.geometry,
        torch.are_deterministic_algorithms_enabled(),
    )
    grad_bias = grad_output.sum((0, 2, 3)) if ctx.has_bias else None
    return (
        grad_input,
        grad_offset,
        None if saved[2] is None else grad_mask,
        grad_weight,
        grad_bias,
        *(None,) * 5,
    )


register_gradient("deform_conv2d", _backward, _setup_context)


def _autocast(
    dtype: torch.dtype,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *geometry: Any,
) -> tuple:
    # Offsets that are still in fp32 keep their precision; they only need one dtype with the mask.
    coordinate_dtype = dtype if offset.dtype == dtype else torch.float32
    return (
        autocast_tensor(input, dtype),
        autocast_tensor(offset, coordinate_dtype),
        autocast_tensor(mask, coordinate_dtype),
        autocast_tensor(weight, dtype),
        autocast_tensor(bias, dtype),
        *geometry,
    )


register_autocast("deform_conv2d", _autocast)


def _check_channels(input: Tensor, offset: Tensor, weight: Tensor) -> tuple[int, int]:
    """Returns groups and deform groups after checking that channels can be divided by them."""
    if input.dim() != 4:
        raise ValueError(f"input: expected shape (N, C, H, W), got {tuple(input.shape)}")
    if weight.dim() != 4:
        raise ValueError(f"weight: expected shape (O, C/G, Kh, Kw), got {tuple(weight.shape)}")
    if offset.dim() != 4:
        raise ValueError(
            f"offset: expected shape (N, D*Kh*Kw*2, Ho, Wo), got {tuple(offset.shape)}"
        )
    channels = input.shape[1]
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    if group_channels == 0 or channels == 0 or channels % group_channels != 0:
        raise ValueError(
            f"weight: expected C/G (weight.shape[1]) to divide the {channels} channels of input, "
            f"got {tuple(weight.shape)}"
        )
    groups = channels // group_channels
    if out_channels % groups != 0:
        raise ValueError(
            f"weight: expected O (weight.shape[0]) divisible by {groups} groups, "
            f"got {tuple(weight.shape)}"
        )
    per_group = 2 * kernel_h * kernel_w
    if per_group == 0 or offset.shape[1] == 0 or offset.shape[1] % per_group != 0:
        raise ValueError(
            f"offset: expected channels to be a multiple of 2*Kh*Kw = {per_group}, "
            f"got {tuple(offset.shape)}"
        )
    deform_groups = offset.shape[1] // per_group
    if channels % deform_groups != 0:
        raise ValueError(
            f"offset: expected deform groups that divide the {channels} channels of input, "
            f"got {deform_groups} (from {tuple(offset.shape)})"
        )
    return groups, deform_groups


def _check_sizes(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    out_size: tuple[int, int],
) -> None:
    if min(out_size) < 1:
        raise ValueError(
            f"input: {tuple(input.shape)} is smaller than the kernel of weight "
            f"{tuple(weight.shape)} at this stride, padding and dilation: output {out_size}"
        )
    expected = (input.shape[0], offset.shape[1], *out_size)
    if offset.shape != expected:
        raise ValueError(f"offset: expected shape {expected}, got {tuple(offset.shape)}")
    if mask is not None:
        expected = (input.shape[0], offset.shape[1] // 2, *out_size)
        if mask.shape != expected:
            raise ValueError(f"mask: expected shape {expected}, got {tuple(mask.shape)}")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def _check_types(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None
) -> None:
    if not input.is_floating_point():
        raise ValueError(f"input: expected a floating-point dtype, got {input.dtype}")
    device_type = input.device.type
    autocast = device_type in AUTOCAST_KEYS and torch.is_autocast_enabled(device_type)
    for name, tensor in (("offset", offset), ("weight", weight), ("bias", bias), ("mask", mask)):
        if tensor is None:
            continue
        if tensor.device != input.device:
            raise ValueError(f"{name}: expected on {input.device} as input, got {tensor.device}")
        if name in ("weight", "bias") and tensor.dtype != input.dtype and not autocast:
            raise ValueError(f"{name}: expected {input.dtype} as input, got {tensor.dtype}")


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution: each tap of each output pixel samples at its own offset.

    With T = Kh * Kw taps, G groups and D deform groups (both inferred from shapes), tap (i, j) of
    output pixel (ho, wo) samples bilinearly at row ``ho * stride - padding + i * dilation + dy``
    and likewise for columns. A position contributes if ``-1 < row < H`` and ``-1 < column < W``;
    pixels outside the image count as zero, NaN or infinite offsets as well. Coordinates and sums
    are computed in fp32 (fp64 for fp64 input).

    Args:
        input: Shape (N, C, H, W); fp64, fp32, fp16 or bf16.
        offset: Shape (N, D*T*2, Ho, Wo): for each deform group and each tap in row-major order
            (dy, dx) in input pixels; dtype of ``input`` or fp32.
        weight: Shape (O, C/G, Kh, Kw), dtype of ``input``.
        bias: Shape (O,) or None.
        stride: Step in input pixels, one integer or (vertical, horizontal).
        padding: Zero padding in input pixels, likewise.
        dilation: Distance of taps in input pixels, likewise.
        mask: Modulation, shape (N, D*T, Ho, Wo), used as it is (the sigmoid is the caller's);
            dtype as ``offset``. None: v1, no modulation.

    Returns:
        Shape (N, O, Ho, Wo), dtype of ``input``, contiguous.

    Raises:
        ValueError: A shape, dtype or device does not fit; names the argument.

    Source: Dai et al., https://arxiv.org/abs/1703.06211; Zhu et al.,
    https://arxiv.org/abs/1811.11168. Signature of ``torchvision.ops.deform_conv2d``.
    """
    stride, padding = pair(stride, "stride", 1), pair(padding, "padding", 0)
    dilation = pair(dilation, "dilation", 1)
    groups, deform_groups = _check_channels(input, offset, weight)
    out_size = output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    _check_sizes(input, offset, weight, bias, mask, out_size)
    _check_types(input, offset, weight, bias, mask)
    dtype = accumulation_dtype(input.dtype)
    if offset.dtype not in (input.dtype, dtype) or (
        mask is not None and mask.dtype != offset.dtype
    ):
        offset = offset.to(dtype)
        mask = None if mask is None else mask.to(dtype)
    return torch.ops.mmdeform.deform_conv2d(
        input, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups
    )

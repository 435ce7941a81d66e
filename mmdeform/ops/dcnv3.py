"""DCNv3, the operator of InternImage (arXiv 2211.05778)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._arguments import pair
from ._bilinear import bilinear_corners, with_zero_pixel
from ._library import (
    accumulation_dtype,
    autocast_tensor,
    reference_gradients,
    register,
    register_autocast,
    register_gradient,
)
from .deform_conv2d import output_size


def sampling_positions(
    offset: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    offset_scale: float,
    remove_center: bool,
) -> tuple[Tensor, Tensor]:
    """Where :func:`dcnv3` samples its input; the arguments are those of the function, as pairs.

    Args:
        offset: (N, Ho, Wo, G*K*2) as in :func:`dcnv3`.
        kernel_size: (Kh, Kw).
        stride: (vertical, horizontal) in input pixels, as are ``padding`` and ``dilation``.
        padding: See ``stride``.
        dilation: See ``stride``.
        groups: Groups G.
        offset_scale: Stretches the kernel about its centre, offsets included.
        remove_center: Leaves out the middle tap.

    Returns:
        Row and column coordinates in input pixels, each (N, Ho, Wo, G, K), dtype of ``offset``.
    """
    batch, out_h, out_w, _ = offset.shape
    kernel_h, kernel_w = kernel_size
    taps = kernel_h * kernel_w
    kept = [tap for tap in range(taps) if not (remove_center and tap == taps // 2)]
    offset = offset.reshape(batch, out_h, out_w, groups, len(kept), 2)
    centers, grids = [], []
    for axis, out in enumerate((out_h, out_w)):
        middle = dilation[axis] * (kernel_size[axis] - 1) // 2
        start = middle - padding[axis]
        centers.append(torch.arange(out, device=offset.device) * stride[axis] + start)
        # Taps in column-major order: the row changes fastest.
        steps = [tap % kernel_h if axis == 0 else tap // kernel_h for tap in kept]
        grids.append([step * dilation[axis] - middle for step in steps])
    tap_y, tap_x = offset.new_tensor(grids)
    y = centers[0][:, None, None, None] + offset_scale * (tap_y + offset[..., 1])
    x = centers[1][:, None, None] + offset_scale * (tap_x + offset[..., 0])
    return y, x


def dcnv3_reference(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    offset_scale: float,
    remove_center: bool,
) -> Tensor:
    """The specification of :func:`dcnv3`; every argument is required."""
    batch, height, width, channels = input.shape
    dtype = accumulation_dtype(input.dtype)
    y, x = sampling_positions(
        offset.to(dtype),
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        offset_scale,
        remove_center,
    )
    weight = mask.to(dtype).reshape(y.shape)
    pixels = with_zero_pixel(input.to(dtype).flatten(1, 2), 1)  # (N, H*W + 1, C)
    rows = pixels.reshape(pixels.shape[0] * pixels.shape[1] * groups, channels // groups)
    image = torch.arange(batch, device=input.device).view(-1, 1, 1, 1, 1) * pixels.shape[1]
    group = torch.arange(groups, device=input.device).view(-1, 1)
    output: Any = 0
    for index, corner_weight in bilinear_corners(y, x, height, width):
        row = (image + index) * groups + group  # (N, Ho, Wo, G, K)
        corner = rows.index_select(0, row.flatten()).view(*row.shape, channels // groups)
        output = output + (corner * (corner_weight * weight)[..., None]).sum(4)
    return output.flatten(3).to(input.dtype).contiguous()


def _backward_reference(
    grad_output: Tensor, input: Tensor, offset: Tensor, mask: Tensor, *geometry: Any
) -> tuple[Tensor, ...]:
    geometry = geometry[:-1]  # without deterministic

    def function(input: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return dcnv3_reference(input, offset, mask, *geometry)

    return reference_gradients(function, grad_output, (input, offset, mask))


def _fake(input: Tensor, offset: Tensor, *args: Any) -> Tensor:
    return input.new_empty(*offset.shape[:3], input.shape[3])


def _backward_fake(
    grad_output: Tensor, input: Tensor, offset: Tensor, mask: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (input, offset, mask))


def sampled_values(
    input_shape: Any, offset_shape: Any, kernel_size: Any, remove_center: bool
) -> int:
    """Number of values that are interpolated: output elements times taps."""
    taps = kernel_size[0] * kernel_size[1] - int(remove_center)
    return math.prod(offset_shape[:3]) * input_shape[3] * taps


def _flops(
    input_shape: Any, offset_shape: Any, _: Any, kernel_size: Any, *args: Any, **__: Any
) -> int:
    """Per sampled value: four multiply-adds of the blend and one of the weighted sum."""
    return 10 * sampled_values(input_shape, offset_shape, kernel_size, args[5])


def _backward_flops(
    _: Any, input_shape: Any, offset_shape: Any, __: Any, kernel_size: Any, *args: Any, **___: Any
) -> int:
    """Per sampled value: four multiply-adds of dot products and five of the scatter."""
    return 18 * sampled_values(input_shape, offset_shape, kernel_size, args[5])


register(
    "dcnv3(Tensor input, Tensor offset, Tensor mask, int[] kernel_size, int[] stride, "
    "int[] padding, int[] dilation, int groups, float offset_scale, bool remove_center) -> Tensor",
    reference=dcnv3_reference,
    fake=_fake,
    flops=_flops,
)
register(
    "dcnv3_backward(Tensor grad_output, Tensor input, Tensor offset, Tensor mask, "
    "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, "
    "float offset_scale, bool remove_center, bool deterministic) "
    "-> (Tensor grad_input, Tensor grad_offset, Tensor grad_mask)",
    reference=_backward_reference,
    fake=_backward_fake,
    flops=_backward_flops,
)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, offset, mask, *ctx.geometry = inputs
    ctx.save_for_backward(input, offset, mask)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.mmdeform.dcnv3_backward(
        grad_output,
        *ctx.saved_tensors,
        *ctx.geometry,
        torch.are_deterministic_algorithms_enabled(),
    )
    return (*grads, *(None,) * 7)


register_gradient("dcnv3", _backward, _setup_context)


def _autocast(
    dtype: torch.dtype, input: Tensor, offset: Tensor, mask: Tensor, *geometry: Any
) -> tuple:
    # Offsets that are still in fp32 keep their precision; they only need one dtype with the mask.
    coordinate_dtype = dtype if offset.dtype == dtype else torch.float32
    return (
        autocast_tensor(input, dtype),
        autocast_tensor(offset, coordinate_dtype),
        autocast_tensor(mask, coordinate_dtype),
        *geometry,
    )


register_autocast("dcnv3", _autocast)


def check_geometry(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    offset_scale: float,
    remove_center: bool,
) -> tuple[tuple, tuple[int, int, int], int]:
    """Checks what does not depend on how offsets and weights are laid out.

    Returns:
        The arguments behind the tensors as the schema wants them; (N, Ho, Wo); and G*K, the number
        of sampling points of an output pixel.
    """
    kernel_size, stride = pair(kernel_size, "kernel_size", 1), pair(stride, "stride", 1)
    padding, dilation = pair(padding, "padding", 0), pair(dilation, "dilation", 1)
    if input.dim() != 4:
        raise ValueError(f"input: expected shape (N, H, W, C), got {tuple(input.shape)}")
    if not input.is_floating_point():
        raise ValueError(f"input: expected a floating-point dtype, got {input.dtype}")
    batch, height, width, channels = input.shape
    if not isinstance(groups, int) or groups < 1 or channels % groups != 0:
        raise ValueError(
            f"groups: expected a divisor of the {channels} channels of input, got {groups}"
        )
    # torch.compile cannot trace math.isfinite.
    if not isinstance(offset_scale, (int, float)) or not abs(offset_scale) < math.inf:
        raise ValueError(f"offset_scale: expected a finite number, got {offset_scale}")
    taps = kernel_size[0] * kernel_size[1]
    if remove_center:
        if kernel_size[0] != kernel_size[1] or taps % 2 == 0:
            raise ValueError(
                "kernel_size: expected an odd square kernel with remove_center, "
                f"got {tuple(kernel_size)}"
            )
        taps -= 1
    out_size = output_size((height, width), kernel_size, stride, padding, dilation)
    if min(out_size) < 1:
        raise ValueError(
            f"input: {tuple(input.shape)} is smaller than a kernel of {tuple(kernel_size)} "
            f"at this stride, padding and dilation: output {out_size}"
        )
    geometry = (kernel_size, stride, padding, dilation, groups, float(offset_scale))
    return (*geometry, bool(remove_center)), (batch, *out_size), groups * taps


def dcnv3(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> Tensor:
    """DCNv3: every group of channels sums samples at offset taps, weighted by the mask.

    With K = Kh * Kw taps (one less with ``remove_center``), tap (ix, iy) of output pixel (ho, wo)
    samples bilinearly at column ``wo * stride - padding + centre + offset_scale * (ix * dilation -
    centre + x)``, where ``centre = dilation * (Kw - 1) // 2``, and likewise for rows. A position
    contributes if ``-1 < row < H`` and ``-1 < column < W``; pixels outside the image count as
    zero, NaN or infinite offsets as well. Coordinates and sums are computed in fp32 (fp64 for fp64
    input).

    Args:
        input: Channels last, shape (N, H, W, C); fp64, fp32, fp16 or bf16.
        offset: Shape (N, Ho, Wo, G*K*2): for each group and each tap in **column-major** order
            (tap ``ix * Kh + iy``) (x, y) in units of ``offset_scale`` pixels; dtype of ``input`` or
            fp32.
        mask: Shape (N, Ho, Wo, G*K), used as it is (softmax over K is the caller's); dtype as
            ``offset``.
        kernel_size: Taps, one integer or (vertical, horizontal).
        stride: Step in input pixels, likewise.
        padding: Zero padding in input pixels, likewise.
        dilation: Distance of taps in input pixels, likewise.
        groups: Groups of channels G, each with offsets and weights of its own.
        offset_scale: Stretches the kernel about its centre, offsets included.
        remove_center: Leaves out the middle tap of an odd, square kernel.

    Returns:
        Shape (N, Ho, Wo, C), dtype of ``input``, contiguous.

    Raises:
        ValueError: A shape, dtype, device or number does not fit; names the argument.

    Source: Wang et al., InternImage, https://arxiv.org/abs/2211.05778.
    """
    geometry, out_shape, points = check_geometry(
        input, kernel_size, stride, padding, dilation, groups, offset_scale, remove_center
    )
    for name, tensor, channels in (("offset", offset, 2 * points), ("mask", mask, points)):
        expected = (*out_shape, channels)
        if tensor.shape != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")
        if tensor.device != input.device:
            raise ValueError(f"{name}: expected on {input.device} as input, got {tensor.device}")
    dtype = accumulation_dtype(input.dtype)
    if offset.dtype not in (input.dtype, dtype) or mask.dtype != offset.dtype:
        offset, mask = offset.to(dtype), mask.to(dtype)
    return torch.ops.mmdeform.dcnv3(input, offset, mask, *geometry)

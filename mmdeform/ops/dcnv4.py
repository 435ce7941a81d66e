"""DCNv4 (arXiv 2401.06197): the sampling of DCNv3 without softmax, one tensor for all it needs."""

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
from .dcnv3 import check_geometry, dcnv3_reference, sampled_values


def padded_channels(points: int) -> int:
    """Channels of ``offset_mask`` for G*K points: three each, up to the next multiple of 8."""
    return (3 * points + 7) // 8 * 8


def split_offset_mask(offset_mask: Tensor, groups: int, taps: int) -> tuple[Tensor, Tensor]:
    """Takes apart what :func:`dcnv4` gets in one tensor.

    Args:
        offset_mask: (N, Ho, Wo, P) as in :func:`dcnv4`.
        groups: Groups G.
        taps: Taps K.

    Returns:
        ``offset`` (N, Ho, Wo, G*K*2) and ``mask`` (N, Ho, Wo, G*K) of :func:`dcnv3`.
    """
    parts = offset_mask[..., : 3 * groups * taps].unflatten(3, (groups, 3 * taps))
    offset, mask = parts.split((2 * taps, taps), 4)
    return offset.flatten(3), mask.flatten(3)


def dcnv4_reference(
    input: Tensor,
    offset_mask: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    offset_scale: float,
    remove_center: bool,
) -> Tensor:
    """The specification of :func:`dcnv4`; every argument is required."""
    taps = kernel_size[0] * kernel_size[1] - int(remove_center)
    offset, mask = split_offset_mask(offset_mask, groups, taps)
    geometry = (kernel_size, stride, padding, dilation, groups, offset_scale, remove_center)
    return dcnv3_reference(input, offset, mask, *geometry)


def _backward_reference(
    grad_output: Tensor, input: Tensor, offset_mask: Tensor, *geometry: Any
) -> tuple[Tensor, ...]:
    geometry = geometry[:-1]  # without deterministic

    def function(input: Tensor, offset_mask: Tensor) -> Tensor:
        return dcnv4_reference(input, offset_mask, *geometry)

    return reference_gradients(function, grad_output, (input, offset_mask))


def _fake(input: Tensor, offset_mask: Tensor, *args: Any) -> Tensor:
    return input.new_empty(*offset_mask.shape[:3], input.shape[3])


def _backward_fake(
    grad_output: Tensor, input: Tensor, offset_mask: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    return input.new_empty(input.shape), offset_mask.new_empty(offset_mask.shape)


def _flops(input_shape: Any, offset_mask_shape: Any, kernel_size: Any, *args: Any, **_: Any) -> int:
    """As dcnv3."""
    return 10 * sampled_values(input_shape, offset_mask_shape, kernel_size, args[5])


def _backward_flops(
    _: Any, input_shape: Any, offset_mask_shape: Any, kernel_size: Any, *args: Any, **__: Any
) -> int:
    """As dcnv3."""
    return 18 * sampled_values(input_shape, offset_mask_shape, kernel_size, args[5])


register(
    "dcnv4(Tensor input, Tensor offset_mask, int[] kernel_size, int[] stride, int[] padding, "
    "int[] dilation, int groups, float offset_scale, bool remove_center) -> Tensor",
    reference=dcnv4_reference,
    fake=_fake,
    flops=_flops,
)
register(
    "dcnv4_backward(Tensor grad_output, Tensor input, Tensor offset_mask, int[] kernel_size, "
    "int[] stride, int[] padding, int[] dilation, int groups, float offset_scale, "
    "bool remove_center, bool deterministic) -> (Tensor grad_input, Tensor grad_offset_mask)",
    reference=_backward_reference,
    fake=_backward_fake,
    flops=_backward_flops,
)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, offset_mask, *ctx.geometry = inputs
    ctx.save_for_backward(input, offset_mask)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.mmdeform.dcnv4_backward(
        grad_output,
        *ctx.saved_tensors,
        *ctx.geometry,
        torch.are_deterministic_algorithms_enabled(),
    )
    return (*grads, *(None,) * 7)


register_gradient("dcnv4", _backward, _setup_context)


def _autocast(dtype: torch.dtype, input: Tensor, offset_mask: Tensor, *geometry: Any) -> tuple:
    # Offsets that are still in fp32 keep their precision.
    coordinate_dtype = dtype if offset_mask.dtype == dtype else torch.float32
    return (
        autocast_tensor(input, dtype),
        autocast_tensor(offset_mask, coordinate_dtype),
        *geometry,
    )


register_autocast("dcnv4", _autocast)


def dcnv4(
    input: Tensor,
    offset_mask: Tensor,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> Tensor:
    """DCNv4: every group of channels sums samples at offset taps, with unbounded weights.

    Samples where :func:`mmdeform.ops.dcnv3` does, by the same rules; offsets and weights come in
    one tensor, as one linear layer gives them.

    Args:
        input: Channels last, shape (N, H, W, C); fp64, fp32, fp16 or bf16.
        offset_mask: Shape (N, Ho, Wo, P). Channels of group g begin at ``g * 3 * K``: for each tap
            in **column-major** order (tap ``ix * Kh + iy``) (x, y) in units of ``offset_scale``
            pixels, then the K weights, used as they are. P is 3*G*K rounded up to a multiple of 8;
            what the channels behind 3*G*K hold does not matter, and their gradient is zero. Dtype
            of ``input`` or fp32.
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

    Source: Xiong et al., Efficient Deformable ConvNets, https://arxiv.org/abs/2401.06197.
    """
    geometry, out_shape, points = check_geometry(
        input, kernel_size, stride, padding, dilation, groups, offset_scale, remove_center
    )
    expected = (*out_shape, padded_channels(points))
    if offset_mask.shape != expected:
        raise ValueError(
            f"offset_mask: expected shape {expected}, 3 channels for each of {points} points "
            f"rounded up to a multiple of 8, got {tuple(offset_mask.shape)}"
        )
    if offset_mask.device != input.device:
        raise ValueError(
            f"offset_mask: expected on {input.device} as input, got {offset_mask.device}"
        )
    dtype = accumulation_dtype(input.dtype)
    if offset_mask.dtype not in (input.dtype, dtype):
        offset_mask = offset_mask.to(dtype)
    return torch.ops.mmdeform.dcnv4(input, offset_mask, *geometry)

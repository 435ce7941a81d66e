"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159)."""

from typing import Any

import torch
from torch import Tensor

from ._bilinear import bilinear_corners, with_zero_pixel
from ._library import (
    accumulation_dtype,
    autocast_tensor,
    reference_gradients,
    register,
    register_autocast,
    register_gradient,
)


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The specification of :func:`ms_deform_attn`; every argument is required."""
    batch, _, heads, channels = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    dtype = accumulation_dtype(value.dtype)
    output = value.new_zeros(batch, heads, queries, channels, dtype=dtype)
    starts = level_start_index.tolist()
    for level, (height, width) in enumerate(spatial_shapes.tolist()):
        if height * width == 0:
            continue
        pixels = value[:, starts[level] : starts[level] + height * width]
        pixels = with_zero_pixel(pixels.to(dtype).transpose(1, 2), 2)  # (N, M, H*W + 1, Dh)
        locations = sampling_locations[:, :, :, level].to(dtype).transpose(1, 2)  # (N, M, Lq, P, 2)
        weights = attention_weights[:, :, :, level].to(dtype).transpose(1, 2)  # (N, M, Lq, P)
        x, y = (locations * locations.new_tensor([width, height]) - 0.5).unbind(-1)
        for index, corner_weight in bilinear_corners(y, x, height, width):
            gathered = pixels.gather(2, index.flatten(2)[..., None].expand(-1, -1, -1, channels))
            gathered = gathered.unflatten(2, (queries, points))
            output = output + torch.einsum("nmqpc,nmqp->nmqc", gathered, weights * corner_weight)
    return output.transpose(1, 2).flatten(2).to(value.dtype).contiguous()


def _backward_reference(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    def function(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn_reference(
            value, spatial_shapes, level_start_index, locations, weights
        )

    return reference_gradients(
        function, grad_output, (value, sampling_locations, attention_weights)
    )


def _fake(value: Tensor, *args: Any) -> Tensor:
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, args[2].shape[1], heads * channels)


def _backward_fake(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    inputs = (value, sampling_locations, attention_weights)
    return tuple(tensor.new_empty(tensor.shape) for tensor in inputs)


def _sampled_values(value_shape: torch.Size, locations_shape: torch.Size) -> int:
    batch, queries, heads, levels, points, _ = locations_shape
    return batch * queries * heads * levels * points * value_shape[3]


def _flops(value_shape: Any, _: Any, __: Any, locations_shape: Any, *___: Any, **____: Any) -> int:
    """Per sampled value: four multiply-adds of the blend and one of the weighted sum."""
    return 10 * _sampled_values(value_shape, locations_shape)


def _backward_flops(
    _: Any, value_shape: Any, __: Any, ___: Any, locations_shape: Any, *____: Any, **_____: Any
) -> int:
    """Per sampled value: four multiply-adds of dot products and five of the scatter."""
    return 18 * _sampled_values(value_shape, locations_shape)


register(
    "ms_deform_attn(Tensor value, Tensor spatial_shapes, Tensor level_start_index, "
    "Tensor sampling_locations, Tensor attention_weights) -> Tensor",
    reference=ms_deform_attn_reference,
    fake=_fake,
    flops=_flops,
)
register(
    "ms_deform_attn_backward(Tensor grad_output, Tensor value, Tensor spatial_shapes, "
    "Tensor level_start_index, Tensor sampling_locations, Tensor attention_weights, "
    "bool deterministic) -> (Tensor grad_value, Tensor grad_sampling_locations, "
    "Tensor grad_attention_weights)",
    reference=_backward_reference,
    fake=_backward_fake,
    flops=_backward_flops,
)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    grad_value, grad_locations, grad_weights = torch.ops.mmdeform.ms_deform_attn_backward(
        grad_output, *ctx.saved_tensors, torch.are_deterministic_algorithms_enabled()
    )
    return grad_value, None, None, grad_locations, grad_weights


register_gradient("ms_deform_attn", _backward, _setup_context)


def _autocast(
    dtype: torch.dtype,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple:
    # At a width of 200 pixels a bf16 coordinate is off by up to 0.4 pixels: only the value is cast.
    return (
        autocast_tensor(value, dtype),
        spatial_shapes,
        level_start_index,
        autocast_tensor(sampling_locations, torch.float32),
        autocast_tensor(attention_weights, torch.float32),
    )


register_autocast("ms_deform_attn", _autocast)


def _check(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> None:
    if value.dim() != 4:
        raise ValueError(f"value: expected shape (N, S, M, Dh), got {tuple(value.shape)}")
    if sampling_locations.dim() != 6 or sampling_locations.shape[5] != 2:
        raise ValueError(
            "sampling_locations: expected shape (N, Lq, M, L, P, 2), "
            f"got {tuple(sampling_locations.shape)}"
        )
    batch, _, heads, _ = value.shape
    expected = (batch, sampling_locations.shape[1], heads, *sampling_locations.shape[3:5])
    if sampling_locations.shape[:5] != expected:
        raise ValueError(
            f"sampling_locations: expected N = {batch} and M = {heads} as in value "
            f"{tuple(value.shape)}, got {tuple(sampling_locations.shape)}"
        )
    if attention_weights.shape != expected:
        raise ValueError(
            f"attention_weights: expected shape (N, Lq, M, L, P) = {tuple(expected)}, "
            f"got {tuple(attention_weights.shape)}"
        )
    levels = sampling_locations.shape[3]
    if spatial_shapes.shape != (levels, 2) or spatial_shapes.dtype != torch.int64:
        raise ValueError(
            f"spatial_shapes: expected int64 of shape (L, 2) = ({levels}, 2), "
            f"got {spatial_shapes.dtype} of shape {tuple(spatial_shapes.shape)}"
        )
    if level_start_index.shape != (levels,) or level_start_index.dtype != torch.int64:
        raise ValueError(
            f"level_start_index: expected int64 of shape (L,) = ({levels},), "
            f"got {level_start_index.dtype} of shape {tuple(level_start_index.shape)}"
        )
    for name, tensor in (
        ("spatial_shapes", spatial_shapes),
        ("level_start_index", level_start_index),
        ("sampling_locations", sampling_locations),
        ("attention_weights", attention_weights),
    ):
        if tensor.device != value.device:
            raise ValueError(f"{name}: expected on {value.device} as value, got {tensor.device}")
    if not value.is_floating_point():
        raise ValueError(f"value: expected a floating-point dtype, got {value.dtype}")


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention: a weighted sum of bilinear samples of several feature maps.

    Sampling follows ``align_corners=False`` with zero padding: a location ``(x, y)`` of a level of
    size ``(H, W)`` is the pixel position ``(x * W - 0.5, y * H - 0.5)``. Coordinates and sums are
    computed in fp32 (fp64 for fp64 values).

    Args:
        value: Flattened feature maps, shape (N, S, M, Dh) with S the sum of H * W over the levels,
            M heads and Dh channels per head; fp64, fp32, fp16 or bf16.
        spatial_shapes: (H, W) of each level in pixels, int64, shape (L, 2).
        level_start_index: First token of each level in ``value``, int64, shape (L,); None: levels
            follow one another in the order of ``spatial_shapes``.
        sampling_locations: (x, y) normalised to [0, 1] over the level, shape (N, Lq, M, L, P, 2);
            dtype of ``value`` or fp32. Locations outside count as zeros.
        attention_weights: Shape (N, Lq, M, L, P), used as they are: softmax over L * P is the
            caller's; dtype as ``sampling_locations``.

    Returns:
        Shape (N, Lq, M * Dh), dtype of ``value``.

    Raises:
        ValueError: A shape, dtype or device does not fit; names the argument.
        RuntimeError: ``spatial_shapes`` and ``level_start_index`` point outside ``value``.

    Source: Zhu et al., Deformable DETR, https://arxiv.org/abs/2010.04159.
    """
    if level_start_index is None:
        areas = spatial_shapes.prod(-1)
        level_start_index = areas.cumsum(0) - areas
    _check(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    if sampling_locations.dtype != attention_weights.dtype or (
        sampling_locations.dtype not in (value.dtype, accumulation_dtype(value.dtype))
    ):
        dtype = accumulation_dtype(value.dtype)
        sampling_locations = sampling_locations.to(dtype)
        attention_weights = attention_weights.to(dtype)
    return torch.ops.mmdeform.ms_deform_attn(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )

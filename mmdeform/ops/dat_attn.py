"""Attention with a relative position bias interpolated at deformed keys (DAT, arXiv 2201.00520)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._library import (
    AUTOCAST_KEYS,
    accumulation_dtype,
    autocast_tensor,
    has_kernel,
    reference_gradients,
    register,
    register_autocast,
    register_gradient,
)
from .ms_deform_attn import ms_deform_attn

BACKENDS = ("auto", "fused", "reference")


def _table_weights(positions: Tensor, size: int, table_size: int, align_corners: bool) -> Tensor:
    """How much each key and row (or column) of queries reads of each row (column) of the table.

    Args:
        positions: Coordinates of keys along one axis, normalised, shape (B, G, Ns).
        size: Rows (columns) of queries.
        table_size: Rows (columns) of the table.
        align_corners: See :func:`dat_attn`.

    Returns:
        Shape (B, G, Ns, size, table_size); zeros where the place lies outside the table.
    """
    index = torch.arange(size, dtype=positions.dtype, device=positions.device)
    if not align_corners:
        queries = (2 * index + 1) / size - 1
    else:
        queries = 2 * index / (size - 1) - 1 if size > 1 else torch.zeros_like(index)
    displacement = (queries - positions[..., None]) * 0.5
    place = ((displacement + 1) * 0.5 * (table_size - 1))[..., None]
    inside = (place > -1) & (place < table_size)
    place = place.where(inside, 0)
    low = place.detach().floor()
    cells = torch.arange(table_size, dtype=positions.dtype, device=positions.device)
    # At a cell the derivative is the right-sided one.
    weights = (1 - (place - low)).where(cells == low, 0) + (place - low).where(cells == low + 1, 0)
    return weights.where(inside, 0)


def dat_attn_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    table: Tensor,
    scale: float,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    """The specification of :func:`dat_attn`; also returns the logarithm of softmax's denominator.

    Holds all logits. Differentiable any number of times.
    """
    batch, heads, _, height, width = query.shape
    groups = positions.shape[1]
    dtype = accumulation_dtype(query.dtype)
    place = positions.to(dtype)
    rows = _table_weights(place[..., 0], height, table.shape[1], align_corners)
    columns = _table_weights(place[..., 1], width, table.shape[2], align_corners)
    tables = table.to(dtype).unflatten(0, (groups, heads // groups))
    bias = torch.einsum("bgnir,gmrc->bgmnic", rows, tables)
    bias = torch.einsum("bgmnic,bgnjc->bgmijn", bias, columns).flatten(1, 2).flatten(2, 3)
    queries = query.to(dtype).flatten(3).transpose(2, 3)  # (B, M, H*W, Dh)
    logits = queries @ key.to(dtype) * scale + bias
    logsumexp = logits.logsumexp(-1)
    output = value.to(dtype) @ logits.softmax(-1).transpose(2, 3)
    logsumexp = logsumexp.detach().view(batch, heads, height, width)
    return output.view(query.shape).to(query.dtype), logsumexp


def _backward_reference(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    table: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    scale: float,
    align_corners: bool,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    def function(
        query: Tensor, key: Tensor, value: Tensor, positions: Tensor, table: Tensor
    ) -> Tensor:
        return dat_attn_reference(query, key, value, positions, table, scale, align_corners)[0]

    return reference_gradients(function, grad_output, (query, key, value, positions, table))


def _fake(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (*query.shape[:2], *query.shape[3:])
    logsumexp = query.new_empty(shape, dtype=accumulation_dtype(query.dtype))
    return query.new_empty(query.shape), logsumexp


def _backward_fake(grad_output: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in inputs[:5])


def _flops(query_shape: Any, key_shape: Any, *_: Any, **__: Any) -> int:
    """Query by key and weights by value, as torch counts attention: not the bias."""
    return 4 * math.prod(query_shape) * key_shape[3]


def _backward_flops(_: Any, query_shape: Any, key_shape: Any, *__: Any, **___: Any) -> int:
    """Query by key once more, and the four products of the gradients."""
    return 10 * math.prod(query_shape) * key_shape[3]


register(
    "dat_attn(Tensor query, Tensor key, Tensor value, Tensor positions, Tensor table, "
    "float scale, bool align_corners) -> (Tensor output, Tensor logsumexp)",
    reference=dat_attn_reference,
    fake=_fake,
    flops=_flops,
)
register(
    "dat_attn_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, "
    "Tensor positions, Tensor table, Tensor output, Tensor logsumexp, float scale, "
    "bool align_corners, bool deterministic) -> (Tensor grad_query, Tensor grad_key, "
    "Tensor grad_value, Tensor grad_positions, Tensor grad_table)",
    reference=_backward_reference,
    fake=_backward_fake,
    flops=_backward_flops,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.options = inputs[5:]


def _backward(ctx: Any, grad_output: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.mmdeform.dat_attn_backward(
        grad_output, *ctx.saved_tensors, *ctx.options, torch.are_deterministic_algorithms_enabled()
    )
    return (*gradients, None, None)


register_gradient("dat_attn", _backward, _setup_context)


def _autocast(
    dtype: torch.dtype,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    table: Tensor,
    *options: Any,
) -> tuple:
    # In bf16 a position is off by up to 1/256, which in a table of 27 rows is a twentieth of a row.
    return (
        autocast_tensor(query, dtype),
        autocast_tensor(key, dtype),
        autocast_tensor(value, dtype),
        autocast_tensor(positions, torch.float32),
        autocast_tensor(table, torch.float32),
        *options,
    )


register_autocast("dat_attn", _autocast)


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")


def _check_kernel(name: str, backend: str, device: torch.device) -> None:
    if backend == "fused" and not has_kernel(name, device.type):
        raise RuntimeError(f"backend: expected a kernel for 'fused', {name} has none for {device}")


def _check_shapes(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, table: Tensor
) -> None:
    if query.dim() != 5 or query.shape[2] == 0:
        raise ValueError(
            f"query: expected shape (B, M, Dh, H, W) with Dh > 0, got {tuple(query.shape)}"
        )
    batch, heads, channels = query.shape[:3]
    if key.dim() != 4 or key.shape[:3] != query.shape[:3] or key.shape[3] == 0:
        raise ValueError(
            f"key: expected shape (B, M, Dh, Ns) = ({batch}, {heads}, {channels}, Ns > 0), "
            f"got {tuple(key.shape)}"
        )
    if value.shape != key.shape:
        raise ValueError(f"value: expected {tuple(key.shape)} as key, got {tuple(value.shape)}")
    keys = key.shape[3]
    if positions.dim() != 4 or (positions.shape[0], *positions.shape[2:]) != (batch, keys, 2):
        raise ValueError(
            f"positions: expected shape (B, G, Ns, 2) = ({batch}, G, {keys}, 2), "
            f"got {tuple(positions.shape)}"
        )
    groups = positions.shape[1]
    if groups == 0 or heads % groups != 0:
        raise ValueError(
            f"positions: expected groups that divide the {heads} heads of query, got {groups} "
            f"(from {tuple(positions.shape)})"
        )
    if table.dim() != 3 or table.shape[0] != heads or table.shape[1] * table.shape[2] == 0:
        raise ValueError(
            f"table: expected shape (M, Th, Tw) = ({heads}, Th > 0, Tw > 0), "
            f"got {tuple(table.shape)}"
        )


def _check_types(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, table: Tensor
) -> None:
    device_type = query.device.type
    autocast = device_type in AUTOCAST_KEYS and torch.is_autocast_enabled(device_type)
    for name, tensor in (
        ("query", query),
        ("key", key),
        ("value", value),
        ("positions", positions),
        ("table", table),
    ):
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name}: expected on {query.device} as query, got {tensor.device}")
        if name in ("key", "value") and tensor.dtype != query.dtype and not autocast:
            raise ValueError(f"{name}: expected {query.dtype} as query, got {tensor.dtype}")


def dat_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    table: Tensor,
    *,
    scale: float | None = None,
    align_corners: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Attention of a map of queries to keys at any place, with an interpolated position bias.

    The logit of query pixel (i, j) and key n in head m is ``scale * query . key + bias``. The bias
    is sampled bilinearly in ``table[m]`` at half the displacement ``d = (q - p) / 2`` of the
    query's place q from the key's position p: at row ``(d_y + 1) / 2 * (Th - 1)`` and column
    ``(d_x + 1) / 2 * (Tw - 1)``. A place contributes if ``-1 < row < Th`` and ``-1 < column < Tw``;
    cells outside the table count as zero, and so does the bias of NaN or infinite positions. The
    output is the mean of the values, weighted by the softmax of the logits over keys. The kernels
    hold no logits: memory grows with H * W + Ns. Sums are computed in fp32 (fp64 for fp64 data).

    Args:
        query: Shape (B, M, Dh, H, W), M heads of Dh channels; fp64, fp32, fp16 or bf16.
        key: Shape (B, M, Dh, Ns), dtype of ``query``; Ns > 0.
        value: Shape and dtype of ``key``.
        positions: (y, x) of each key in [-1, 1] over the map, shape (B, G, Ns, 2); G divides M, and
            group g serves the heads from g * M / G on; dtype of ``query`` or fp32.
        table: Biases by displacement, shape (M, Th, Tw); dtype as ``positions``.
        scale: Factor of the products; None: Dh**-0.5.
        align_corners: Where queries lie: True: from -1 to 1, ``2i / (H - 1) - 1``, 0 where H = 1
            (DAT++); False: at the centres of pixels, ``(2i + 1) / H - 1`` (DAT).
        backend: ``"auto"``: the kernel where there is one; ``"fused"``: the kernel or an error;
            ``"reference"``: plain PyTorch, which holds all logits and can be differentiated twice.

    Returns:
        Shape (B, M, Dh, H, W), dtype of ``query``, contiguous.

    Raises:
        ValueError: A shape, dtype or device does not fit; names the argument.
        RuntimeError: ``backend="fused"`` on a device without a kernel.

    Source: Xia et al., DAT, https://arxiv.org/abs/2201.00520, and DAT++,
    https://arxiv.org/abs/2309.01430.
    """
    _check_backend(backend)
    _check_shapes(query, key, value, positions, table)
    _check_types(query, key, value, positions, table)
    _check_kernel("dat_attn", backend, query.device)
    if scale is None:
        scale = query.shape[2] ** -0.5
    elif not -math.inf < scale < math.inf:
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if positions.dtype != table.dtype or (
        positions.dtype not in (query.dtype, accumulation_dtype(query.dtype))
    ):
        dtype = accumulation_dtype(query.dtype)
        positions, table = positions.to(dtype), table.to(dtype)
    if backend == "reference":
        return dat_attn_reference(query, key, value, positions, table, scale, align_corners)[0]
    return torch.ops.mmdeform.dat_attn(query, key, value, positions, table, scale, align_corners)[0]


def dat_sample(input: Tensor, positions: Tensor, backend: str = "auto") -> Tensor:
    """Samples a feature map bilinearly at the positions of the keys of :func:`dat_attn`.

    Position (y, x) is row ``(y + 1) / 2 * (H - 1)`` and column ``(x + 1) / 2 * (W - 1)``
    (``align_corners=True``), with zeros outside; NaN and infinite positions give zeros. Positions
    keep their precision beside 16-bit maps. The kernel is that of :func:`ms_deform_attn`.

    Args:
        input: Shape (B, C, H, W).
        positions: (y, x) normalised to [-1, 1], shape (B, G, Ns, 2); G divides C, and group g
            samples the channels from g * C / G on.
        backend: As in :func:`dat_attn`; the reference is ``F.grid_sample``.

    Returns:
        Shape (B, C, Ns), dtype of ``input``.

    Raises:
        ValueError: A shape, dtype or device does not fit; names the argument.
        RuntimeError: ``backend="fused"`` on a device without a kernel.
    """
    _check_backend(backend)
    if input.dim() != 4:
        raise ValueError(f"input: expected shape (B, C, H, W), got {tuple(input.shape)}")
    batch, channels, height, width = input.shape
    if positions.dim() != 4 or positions.shape[0] != batch or positions.shape[3] != 2:
        raise ValueError(
            f"positions: expected shape (B, G, Ns, 2) = ({batch}, G, Ns, 2), "
            f"got {tuple(positions.shape)}"
        )
    groups = positions.shape[1]
    if groups == 0 or channels % groups != 0:
        raise ValueError(
            f"positions: expected groups that divide the {channels} channels of input, got {groups}"
        )
    for name, tensor in (("input", input), ("positions", positions)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")
        if tensor.device != input.device:
            raise ValueError(f"{name}: expected on {input.device} as input, got {tensor.device}")
    _check_kernel("ms_deform_attn", backend, input.device)
    dtype = accumulation_dtype(input.dtype)
    positions = positions.to(dtype)
    if backend == "reference":
        finite = positions.isfinite().all(-1)  # (B, G, Ns)
        grid = positions.where(finite[..., None], 0).flip(-1).flatten(0, 1)[:, None]
        maps = input.to(dtype).reshape(batch * groups, channels // groups, height, width)
        samples = F.grid_sample(maps, grid, align_corners=True)
        samples = samples.view(batch, groups, channels // groups, positions.shape[2])
        return samples.where(finite[:, :, None], 0).flatten(1, 2).to(input.dtype)
    # Positions of align_corners=False, which ms_deform_attn follows.
    x, y = (
        ((positions[..., axis] + 1) * 0.5 * (size - 1) + 0.5) / size
        for axis, size in ((1, width), (0, height))
    )
    locations = torch.stack([x, y], -1).transpose(1, 2)[:, :, :, None, None]  # (B, Ns, G, 1, 1, 2)
    samples = ms_deform_attn(
        input.flatten(2).unflatten(1, (groups, -1)).permute(0, 3, 1, 2),
        torch.stack([torch.full((1,), size, device=input.device) for size in (height, width)], 1),
        torch.zeros(1, dtype=torch.int64, device=input.device),
        locations,
        torch.ones_like(locations[..., 0]),
    )
    return samples.transpose(1, 2).contiguous()

"""The arithmetic of neighbourhood attention.

Windows are gathered for some queries at a time, small enough for a cache, and once more in the
backward pass, so that nothing of the size of queries times keys is ever in memory.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["neighborhood_attention"]

# Gathered elements of keys in flight: within the cache of a CPU, enough for all cores of a GPU.
_CHUNK = {"cpu": 2**20}
_LARGE_CHUNK = 2**24


def neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, drop: float = 0.0
) -> Tensor:
    """Attention of each pixel to the k*k pixels around it.

    Near borders windows are moved inward. A double backward is refused.

    Args:
        query: Shape (B, M, H, W, D), H and W at least k; scaled by D**-0.5 here.
        key: Shape (B, M, H, W, D).
        value: Shape (B, M, H, W, D).
        bias: Added to logits by displacement (y, x) of the key from the query, from 1 - k to
            k - 1, shape (M, 2k - 1, 2k - 1).
        drop: Share of attention weights to drop, the others are scaled up. Default: 0.0.

    Returns:
        Shape (B, M, H, W, D).
    """
    seed = int(torch.randint(2**31, ())) if drop else 0
    tensors = [tensor.flatten(2, 3).flatten(0, 1).contiguous() for tensor in (query, key, value)]
    tensors[0] = tensors[0] * query.shape[-1] ** -0.5
    tensors.append(bias.flatten(1))
    problem = _Problem(query.shape[2], query.shape[3], (bias.shape[-1] + 1) // 2, drop, seed)
    # A traced graph, which is what FLOP counters look into, would not show inside the function.
    if torch.is_grad_enabled() and not torch.jit.is_tracing():
        output = _Attention.apply(*tensors, problem)
    else:
        output = _forward(*tensors, problem)
    return output.view(query.shape)


class _Problem(NamedTuple):
    """What does not change from one chunk of queries to the next."""

    height: int
    width: int
    kernel: int
    drop: float
    seed: int


class _Chunk(NamedTuple):
    """Some queries and their windows.

    Attributes:
        start: First query, as y * W + x.
        stop: The one behind the last.
        pixels: Of the windows, as y * W + x, shape (n, k * k).
        displacements: Columns of the bias, shape (n, k * k).
        band: First pixel of the rows that the windows touch, and the one behind the last.
    """

    start: int
    stop: int
    pixels: Tensor
    displacements: Tensor
    band: tuple[int, int]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, problem: _Problem
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, bias)
        ctx.problem = problem
        return _forward(query, key, value, bias, problem)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(grad_output, *ctx.saved_tensors, ctx.problem), None


def _forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, problem: _Problem) -> Tensor:
    """Queries, keys, values and output (B * M, H * W, D), bias (M, displacements)."""
    outputs = []
    for chunk in _chunks(query, problem):
        weights = _weights(query, _gather(key, chunk.pixels), bias, chunk)
        mask = _dropout_mask(weights, problem, chunk)
        if mask is not None:
            weights = weights * mask
        output = weights.to(value.dtype) @ _gather(value, chunk.pixels)
        outputs.append(output.view(query.shape[0], chunk.stop - chunk.start, query.shape[2]))
    return torch.cat(outputs, 1)


def _backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    problem: _Problem,
) -> tuple[Tensor, ...]:
    tensors = query, key, value, bias
    grads = [torch.zeros_like(tensor, dtype=_sum_dtype(query)) for tensor in tensors]
    for chunk in _chunks(query, problem):
        keys, values = _gather(key, chunk.pixels), _gather(value, chunk.pixels)
        queries, grad = (_rows(tensor, chunk) for tensor in (query, grad_output))
        weights = _weights(query, keys, bias, chunk)
        mask = _dropout_mask(weights, problem, chunk)
        grad_weights = grad @ values.transpose(1, 2)
        dropped = weights
        if mask is not None:
            dropped, grad_weights = weights * mask, grad_weights * mask
        grad_logits = weights * grad_weights
        grad_logits = grad_logits - weights * grad_logits.sum(-1, keepdim=True)
        grads[3] += _sum_by_displacement(grad_logits, bias, chunk)
        own = grads[0][:, chunk.start : chunk.stop]
        own += (grad_logits.to(keys.dtype) @ keys).view(own.shape)
        _scatter(grads[1], grad_logits.transpose(1, 2) * queries, chunk)
        _scatter(grads[2], dropped.transpose(1, 2) * grad, chunk)
    return tuple(grad.to(tensor.dtype) for grad, tensor in zip(grads, tensors, strict=True))


def _chunks(query: Tensor, problem: _Problem) -> Iterator[_Chunk]:
    height, width, kernel = problem.height, problem.width, problem.kernel
    limit = _CHUNK.get(query.device.type, _LARGE_CHUNK)
    step = max(1, limit // max(1, query.shape[0] * query.shape[2] * kernel**2))
    taps = torch.arange(kernel, device=query.device)
    for start in range(0, height * width, step):
        stop = min(start + step, height * width)
        queries = torch.arange(start, stop, device=query.device)[:, None]
        y, x = queries // width, queries % width
        top = (y - kernel // 2).clamp(0, height - kernel) + taps  # (n, k)
        left = (x - kernel // 2).clamp(0, width - kernel) + taps
        pixels = top[:, :, None] * width + left[:, None]
        down, right = top - y + kernel - 1, left - x + kernel - 1
        displacements = down[:, :, None] * (2 * kernel - 1) + right[:, None]
        first, last = (
            min(max(0, query // width - kernel // 2), height - kernel)
            for query in (start, stop - 1)
        )
        band = (first * width, (last + kernel) * width)
        yield _Chunk(start, stop, pixels.flatten(1), displacements.flatten(1), band)


def _rows(tensor: Tensor, chunk: _Chunk) -> Tensor:
    """The queries of a chunk as rows of one element each, shape (B * M * n, 1, D)."""
    return tensor[:, chunk.start : chunk.stop].reshape(-1, 1, tensor.shape[-1])


def _gather(tensor: Tensor, pixels: Tensor) -> Tensor:
    """Windows of (B * M, H * W, D), shape (B * M * n, k * k, D)."""
    images = torch.arange(tensor.shape[0], device=tensor.device)[:, None, None]
    index = (images * tensor.shape[1] + pixels).flatten(0, 1)
    return F.embedding(index, tensor.flatten(0, 1))


def _scatter(grad: Tensor, windows: Tensor, chunk: _Chunk) -> None:
    """Adds windows (B * M * n, k * k, D) to the pixels that they were gathered from."""
    first, last = chunk.band
    images = torch.arange(grad.shape[0], device=grad.device)[:, None, None]
    index = images * (last - first) + chunk.pixels - first
    band = _sum_rows(windows.flatten(0, 1), index.flatten(), grad.shape[0] * (last - first))
    grad[:, first:last] += band.view(grad.shape[0], last - first, grad.shape[2])


def _sum_by_displacement(grad_logits: Tensor, bias: Tensor, chunk: _Chunk) -> Tensor:
    """The gradient of the bias, (M, displacements)."""
    count = chunk.displacements.numel()
    by_head = grad_logits.view(-1, bias.shape[0], count).sum(0)
    rows = _sum_rows(by_head.t().contiguous(), chunk.displacements.flatten(), bias.shape[1])
    return rows.t()


def _sum_rows(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """Sums the rows of each index."""
    return torch.ops.aten.embedding_dense_backward(rows, index, count, -1, False)


def _weights(query: Tensor, keys: Tensor, bias: Tensor, chunk: _Chunk) -> Tensor:
    """Softmaxed weights of a chunk, shape (B * M * n, 1, k * k), in the dtype of sums."""
    logits = _rows(query, chunk) @ keys.transpose(1, 2)
    by_head = bias[:, chunk.displacements]  # (M, n, k * k)
    logits = logits.to(_sum_dtype(query)).view(-1, *by_head.shape) + by_head
    return logits.softmax(-1).view(-1, 1, by_head.shape[-1])


def _dropout_mask(weights: Tensor, problem: _Problem, chunk: _Chunk) -> Tensor | None:
    """The same factors whenever it is called for the same chunk."""
    if not problem.drop:
        return None
    generator = torch.Generator(weights.device).manual_seed(problem.seed + chunk.start)
    kept = torch.rand(weights.shape, generator=generator, device=weights.device) >= problem.drop
    return kept.to(weights.dtype) / (1 - problem.drop)


def _sum_dtype(data: Tensor) -> torch.dtype:
    return torch.promote_types(data.dtype, torch.float32)

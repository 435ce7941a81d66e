"""What the tests of DeformableAttention2d share: the published module, written out head by head."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mmdeform.layers import DeformableAttention2d

Read = Callable[[Tensor, Tensor], Tensor]

biases = pytest.mark.parametrize(
    "bias", ["relative", "depthwise", "fixed", "log_cpb", None], ids=str
)
versions = pytest.mark.parametrize("version", ["v1", "pp"])


def make(**options: Any) -> DeformableAttention2d:
    """A small layer in fp64 whose offsets and biases are of order 1."""
    settings = dict(embed_dims=12, num_heads=6, num_groups=3, feat_size=(4, 6), kernel_size=3)
    layer = DeformableAttention2d(**(settings | options)).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def read_by_grid_sample(map: Tensor, points: Tensor) -> Tensor:
    """Values (C, ...) of a map (C, H, W) at normalised points (..., 2) as (y, x)."""
    samples = functional.grid_sample(
        map[None], points.flip(-1).reshape(1, 1, -1, 2), align_corners=True
    )
    return samples.view(map.shape[0], *points.shape[:-1])


def read_by_hand(map: Tensor, points: Tensor) -> Tensor:
    """The same, pixel by pixel."""
    _, height, width = map.shape
    samples = []
    for point in points.reshape(-1, 2):
        y = (point[0] + 1) / 2 * (height - 1)
        x = (point[1] + 1) / 2 * (width - 1)
        pixels = [
            map[:, i, j] * (1 - (y - i).abs()).clamp(min=0) * (1 - (x - j).abs()).clamp(min=0)
            for i in range(height)
            for j in range(width)
        ]
        samples.append(torch.stack(pixels).sum(0))
    return torch.stack(samples, -1).view(map.shape[0], *points.shape[:-1])


def lattice(rows: Tensor, columns: Tensor) -> Tensor:
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)


def line(count: int, first: float, divisor: int) -> Tensor:
    """``count`` coordinates a step of 2 / divisor apart."""
    if divisor == 0:
        return torch.zeros(1).double()
    return (torch.arange(count).double() + first) / divisor * 2 - 1


def expected_positions(layer: DeformableAttention2d, query: Tensor) -> tuple[Tensor, Tensor]:
    """Of one image and group, from its query (C / G, H, W): positions and reference points."""
    v1, s = layer.version == "v1", layer.offset_range_factor
    conv, norm, last = layer.conv_offset[0], layer.conv_offset[1].norm, layer.conv_offset[3]
    if layer.use_offsets:
        padding = [
            0 if not v1 and kernel == stride else kernel // 2
            for kernel, stride in zip(layer.kernel_size, layer.stride, strict=True)
        ]
        hidden = functional.conv2d(
            query[None], conv.weight, conv.bias, layer.stride, padding, groups=len(query)
        )[0]
        mean, var = hidden.mean(0), hidden.var(0, unbiased=False)
        hidden = (hidden - mean) / (var + 1e-5).sqrt() * norm.weight[:, None, None]
        hidden = functional.gelu(hidden + norm.bias[:, None, None])
        offset = torch.einsum("pc,chw->hwp", last.weight[:, :, 0, 0], hidden)
    else:
        offset = torch.zeros(
            query.shape[1] // layer.stride[0], query.shape[2] // layer.stride[1], 2
        ).double()
    rows, columns = offset.shape[:2]
    if v1:
        reference = lattice(line(rows, 0.5, rows), line(columns, 0.5, columns))
    else:
        reference = lattice(line(rows, 0.5, rows - 1), line(columns, 0.5, columns - 1))
    if s > 0 or (s == 0 and not v1):
        steps = (rows, columns) if v1 else (max(rows - 1, 1), max(columns - 1, 1))
        return reference + offset.tanh() * s / torch.tensor(steps).double(), reference
    if s == 0:
        return reference + offset, reference
    moved = reference + offset
    return (moved.tanh() if v1 else moved.clamp(-1, 1)), reference


def expected_bias(
    layer: DeformableAttention2d, head: int, positions: Tensor, size: tuple[int, int], read: Read
) -> Tensor | float:
    """Position bias (H, W, Ns) of one head, from the positions (Ns, 2) of its keys."""
    height, width = size
    if layer.version == "v1":
        queries = lattice(line(height, 0.5, height), line(width, 0.5, width))
    else:
        queries = lattice(line(height, 0, height - 1), line(width, 0, width - 1))
    displacement = queries[:, :, None] - positions
    table = layer.rpe_table
    if layer.position_bias == "relative":
        return read(table[head][None], displacement / 2)[0]
    if layer.position_bias == "log_cpb":
        spaced = (displacement * 4).sign() * ((displacement * 4).abs() + 1).log2() / 3
        hidden = functional.relu(spaced @ table[0].weight.T + table[0].bias)
        return hidden @ table[2].weight[head % (layer.num_heads // layer.num_groups)]
    if layer.position_bias == "fixed":
        entries = functional.interpolate(
            table[None, head : head + 1],
            (height * width, len(positions)),
            mode="bilinear",
            align_corners=True,
        )
        return entries.view(height, width, -1)
    return 0.0


def expected(
    layer: DeformableAttention2d, x: Tensor, read: Read = read_by_grid_sample
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, positions and attention weights (B, M, H * W, Ns) of a layer without dropout."""
    batch, channels, height, width = x.shape
    per_group, per_head = channels // layer.num_groups, channels // layer.num_heads
    query = layer.proj_q(x)
    output = torch.zeros_like(x)
    all_positions, all_weights = [], []
    for index in range(batch):
        sampled = []
        for group in range(layer.num_groups):
            own = slice(group * per_group, (group + 1) * per_group)
            positions, _ = expected_positions(layer, query[index, own])
            all_positions.append(positions)
            if layer.use_offsets:
                sampled.append(read(x[index, own], positions).flatten(1))
            else:
                sampled.append(functional.avg_pool2d(x[index, own], layer.stride).flatten(1))
        keys = torch.cat(sampled)  # (C, Ns)
        key = layer.proj_k.weight[:, :, 0, 0] @ keys + layer.proj_k.bias[:, None]
        value = layer.proj_v.weight[:, :, 0, 0] @ keys + layer.proj_v.bias[:, None]
        heads = []
        for head in range(layer.num_heads):
            own = slice(head * per_head, (head + 1) * per_head)
            group = head // (layer.num_heads // layer.num_groups)
            positions = all_positions[index * layer.num_groups + group].view(-1, 2)
            logits = torch.einsum("chw,cn->hwn", query[index, own], key[own]) * per_head**-0.5
            bias = expected_bias(layer, head, positions, (height, width), read)
            weights = (logits + bias).softmax(-1)
            all_weights.append(weights.flatten(0, 1))
            heads.append(torch.einsum("hwn,cn->chw", weights, value[own]))
        output[index] = torch.cat(heads)
    if layer.position_bias == "depthwise":
        output = output + functional.conv2d(
            query, layer.rpe_table.weight, layer.rpe_table.bias, padding=1, groups=channels
        )
    positions = torch.stack(all_positions).unflatten(0, (batch, layer.num_groups))
    weights = torch.stack(all_weights).unflatten(0, (batch, layer.num_heads))
    return layer.proj_out(output), positions, weights

"""Attention of one query over an image: as a map, or as the points that it samples."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .core import Attention

__all__ = ["AttentionMap", "Samples", "cell_size", "dense_map", "samples_of", "splat"]

Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class AttentionMap:
    """Attention to the pixels of a map.

    Attributes:
        weights: Of each head, shape (M, H, W). They sum to 1, or less by what samples outside the
            map have.
        cell: (width, height) of a pixel of the map, in pixels of the network's input.
    """

    weights: Tensor
    cell: tuple[float, float]


@dataclass(frozen=True)
class Samples:
    """What one query of deformable attention samples, for M heads.

    Attributes:
        points: (x, y) in pixels of the sampled map, whose first pixel has its centre at 0, shape
            (M, n, 2).
        sizes: (width, height) of the sampled map, shape (M, n, 2).
        weights: Attention, shape (M, n).
    """

    points: Tensor
    sizes: Tensor
    weights: Tensor

    def in_input(self, size: Size) -> Tensor:
        """The points in pixels of the network's input, from the edge of its first pixel.

        Args:
            size: (width, height) of the input.
        """
        points = torch.empty_like(self.points)
        for map_size in self.sizes.flatten(0, 1).unique(dim=0):
            width, height = map_size.long().tolist()
            here = (self.sizes == map_size).all(-1)
            cell = points.new_tensor(cell_size(size, (width, height)))
            points[here] = (self.points[here] + 0.5) * cell
        return points


def cell_size(size: Size, map_size: Size) -> tuple[float, float]:
    """(width, height) of a pixel of a map in pixels of the input that it was made from.

    Maps are smaller than their input by a power of two, rounded up: 42 pixels of a map cover 1344
    of an input 1333 pixels wide. Where no power fits they are taken to cover the input exactly.

    Args:
        size: (width, height) of the input.
        map_size: The same of the map.
    """
    cells = []
    for length, count in zip(size, map_size, strict=True):
        strides = [2**power for power in range(12) if -(-length // 2**power) == count]
        cells.append(float(strides[0]) if strides else length / count)
    return cells[0], cells[1]


def dense_map(
    attention: Attention, query: int, size: Size, map_sizes: Sequence[Size]
) -> AttentionMap:
    """The weights of dense attention in the places of their keys.

    Args:
        attention: Of a layer.
        query: Index of the query.
        size: (width, height) of the input.
        map_sizes: Those of the maps of which one is attended to.

    Raises:
        ValueError: The keys are not the pixels of one map.
    """
    fitting = [(w, h) for w, h in map_sizes if w * h == attention.keys]
    if not fitting:
        raise ValueError(
            f"expected attention to the pixels of a map of {map_sizes}, got {attention.keys} keys"
        )
    width, height = fitting[-1]
    weights = attention.weights(torch.tensor([query]))[0, :, 0]
    return AttentionMap(weights.view(-1, height, width), cell_size(size, (width, height)))


def samples_of(attention: Attention, query: int) -> Samples:
    """The samples of a query of multi-scale deformable attention, in the first image.

    Args:
        attention: Of a layer.
        query: Index of the query.

    Raises:
        ValueError: The layer is another one.
    """
    sampling = attention.sampling
    if sampling is None or attention.kind != "deformable":
        raise ValueError(f"expected deformable attention, got {attention.kind} attention")
    sizes = sampling.size.expand(sampling.locations.shape)
    return Samples(
        sampling.locations[0, query].flatten(1, 2),  # (M, L, P, 2)
        sizes[0, query].flatten(1, 2),
        attention.weights(torch.tensor([query]))[0, :, 0],
    )


def splat(samples: Samples, size: Size, map_sizes: Sequence[Size]) -> AttentionMap:
    """Spreads samples over the pixels that they read, and all maps over the grid of the finest.

    Args:
        samples: Of one query.
        size: (width, height) of the input.
        map_sizes: Those of the sampled maps.
    """
    heads = samples.weights.shape[0]
    finest = max(map_sizes)
    total = samples.weights.new_zeros(heads, finest[1], finest[0])
    for map_size in dict.fromkeys(map_sizes):
        here = (samples.sizes == samples.sizes.new_tensor(map_size)).all(-1)
        weights = samples.weights * here
        level = _read_pixels(samples.points, weights, map_size)
        for dim, axis in ((2, 0), (1, 1)):  # columns, rows
            parents = _parents(size[axis], map_size[axis], finest[axis], level.device)
            shares = parents.bincount(minlength=map_size[axis]).clamp(min=1)[parents]
            level = level.index_select(dim, parents)
            level = level / (shares if dim == 2 else shares[:, None])
        total += level
    return AttentionMap(total, cell_size(size, finest))


def _read_pixels(points: Tensor, weights: Tensor, map_size: Size) -> Tensor:
    """Weights of the pixels that bilinear interpolation reads, shape (M, H, W)."""
    width, height = map_size
    pixels = weights.new_zeros(weights.shape[0], height * width)
    corner = points.floor()
    part = points - corner
    for dx in (0, 1):
        for dy in (0, 1):
            x, y = corner[..., 0] + dx, corner[..., 1] + dy
            share = (part[..., 0] if dx else 1 - part[..., 0]) * (
                part[..., 1] if dy else 1 - part[..., 1]
            )
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            index = (y * width + x).where(inside, x.new_zeros(())).long()
            pixels.scatter_add_(1, index, (weights * share).masked_fill(~inside, 0))
    return pixels.view(-1, height, width)


def _parents(length: int, cells: int, finest: int, device: torch.device) -> Tensor:
    """For each cell of the finest grid, along one axis: the cell of a coarser one over it."""
    fine, _ = cell_size((length, length), (finest, finest))
    coarse, _ = cell_size((length, length), (cells, cells))
    centres = (torch.arange(finest, device=device) + 0.5) * fine
    return (centres / coarse).long().clamp(max=cells - 1)

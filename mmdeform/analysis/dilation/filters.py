"""How far apart the sampling locations of a filter are."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["adjacent_taps", "effective_dilation"]


def adjacent_taps(grid: Tensor) -> Tensor:
    """Pairs of taps of a kernel that are horizontal or vertical neighbours.

    Args:
        grid: Where the taps of one output sample without offsets, (x, y), shape (K, 2), in any
            order. A kernel may lack taps, as that of DCNv3 with ``remove_center`` does: neighbours
            of a missing tap are not neighbours of each other, which leaves 8 pairs of the 12.

    Returns:
        Indices of the taps of each pair, int64, shape (P, 2); empty for a 1x1 kernel.
    """
    column, row = (values.unique(return_inverse=True)[1] for values in grid.unbind(-1))
    steps = (column[:, None] - column).abs() + (row[:, None] - row).abs()
    return (steps == 1).triu().nonzero()


def effective_dilation(
    locations: Tensor, pairs: Tensor, scale: Sequence[float] = (1.0, 1.0)
) -> Tensor:
    """Mean distance between adjacent sampling locations of each filter.

    Args:
        locations: Sampling locations (x, y), shape (N, D, K, Ho, Wo, 2).
        pairs: Neighbours, shape (P, 2); see :func:`adjacent_taps`.
        scale: What (x, y) are multiplied by, to measure in another unit. Default: 1.

    Returns:
        Shape (N, D, Ho, Wo), fp64. Without offsets it is the dilation; where that differs between
        the axes, its mean over the pairs; for DCNv3 and DCNv4 the dilation times ``offset_scale``.
    """
    locations = locations.double()
    first, second = pairs.unbind(-1)
    steps = locations[:, :, second] - locations[:, :, first]
    return torch.linalg.vector_norm(steps * steps.new_tensor(scale), dim=-1).mean(2)

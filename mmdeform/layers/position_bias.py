"""Position biases that are added to the logits of attention over deformed keys, as whole tensors.

Positions are (y, x), normalised to [-1, 1] over the map. K counts queries, Ns keys, M heads and G
groups of M / G heads each, which share their keys' positions.

Source: public code of DAT and DAT++, https://github.com/LeapLabTHU/DAT.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["fixed_bias", "log_cpb_bias", "relative_bias"]


def relative_bias(table: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Interpolates a table that spans all displacements between two positions of a map.

    Args:
        table: Shape (M, Th, Tw).
        queries: Positions of the queries, shape (K, 2).
        keys: Positions of the keys, shape (B, G, Ns, 2).

    Returns:
        Shape (B, M, K, Ns), dtype of ``keys``. Beyond the table it is zero.
    """
    batch, groups = keys.shape[:2]
    displacement = _displacement(queries, keys) * 0.5
    tables = table.to(keys.dtype).unflatten(0, (groups, -1)).expand(batch, -1, -1, -1, -1)
    bias = functional.grid_sample(
        tables.flatten(0, 1), displacement.flip(-1).flatten(0, 1), align_corners=True
    )
    return bias.view(batch, len(table), *bias.shape[2:])


def log_cpb_bias(network: nn.Sequential, queries: Tensor, keys: Tensor) -> Tensor:
    """A small network of log-spaced displacements: the continuous position bias of Swin v2.

    Args:
        network: Maps (..., 2) to (..., M / G); begins with a linear layer.
        queries: Positions of the queries, shape (K, 2).
        keys: Positions of the keys, shape (B, G, Ns, 2).

    Returns:
        Shape (B, M, K, Ns).
    """
    displacement = _displacement(queries, keys) * 4
    spaced = displacement.sign() * torch.log2(displacement.abs() + 1) / math.log2(8)
    bias = network(spaced.to(network[0].weight.dtype))
    return bias.movedim(-1, 2).flatten(1, 2)


def fixed_bias(table: Tensor, queries: int, keys: int) -> Tensor:
    """A table with an entry for each query and key, resized bilinearly where their number differs.

    Args:
        table: Shape (M, queries, keys) of the map that it was made for.
        queries: Number of queries.
        keys: Number of keys.

    Returns:
        Shape (1, M, queries, keys).
    """
    if table.shape[1:] == (queries, keys):
        return table[None]
    # The flattened axes are resized as they are, as in the public detection code.
    return functional.interpolate(table[None], (queries, keys), mode="bilinear", align_corners=True)


def _displacement(queries: Tensor, keys: Tensor) -> Tensor:
    """From each key to each query, shape (B, G, K, Ns, 2)."""
    return queries[:, None] - keys[:, :, None]

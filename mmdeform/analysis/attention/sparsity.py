"""How sparse attention is.

The negative entropy of attention weights a_ij, (1 / m) sum_i sum_j a_ij log a_ij over m queries i
and their keys j, with natural logarithms: 0 if every query attends to one key, -log n if it attends
to n keys alike. So it grows while attention becomes sparse, but its smallest value depends on n.
The normalised entropy does not: a query's entropy divided by log n is 1 if it attends to all n keys
alike, 0 if to one. Attention to 4 samples and to 1000 pixels can be compared by it.

Source: Sun et al., "Rethinking Transformer-based Set Prediction for Object Detection" (2021),
https://arxiv.org/abs/2011.10881, for the negative entropy.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .core import Attention, place_of, watch_attention

__all__ = ["LayerSparsity", "Sparsity", "negative_entropy", "record_sparsity"]


def negative_entropy(weights: Tensor) -> Tensor:
    """Sum of a log a over the last dimension, where 0 log 0 = 0.

    Args:
        weights: Attention weights, which sum to 1 over the last dimension, shape (..., n).

    Returns:
        Between -log n and 0, shape (...).
    """
    return torch.xlogy(weights, weights).sum(-1)


@dataclass(frozen=True)
class Sparsity:
    """Means over queries of one head, or of all heads of a layer.

    Attributes:
        negative_entropy: Mean over the queries of the sum of a log a; the paper's measure. NaN if
            there were no queries.
        normalised_entropy: Mean over the queries of entropy / log n, for n keys that the query may
            attend to: 1 is an average, 0 one key. NaN if no query had more than one key.
    """

    negative_entropy: float
    normalised_entropy: float


class LayerSparsity:
    """Sums over all queries that a layer has had so far.

    Attributes:
        name: Name of the layer in its model.
        kind: See :class:`Attention`.
        place: See :func:`place_of`.
        fewest_keys, most_keys: Of one query, without masked keys; None before there was a query.
    """

    def __init__(self, name: str, attention: Attention) -> None:
        self.name = name
        self.kind = attention.kind
        self.place = place_of(name, attention)
        self.fewest_keys: int | None = None
        self.most_keys: int | None = None
        self._sums = torch.zeros(2, attention.heads, dtype=torch.float64)
        self._counts = torch.zeros(2, attention.heads, dtype=torch.int64)

    @property
    def queries(self) -> int:
        """Number of queries m, of all images; without padding and those that attend to nothing."""
        return int(self._counts[0].max())

    @property
    def heads(self) -> list[Sparsity]:
        """Of each head: the mean over the queries."""
        return [Sparsity(*means) for means in (self._sums / self._counts).T.tolist()]

    @property
    def mean(self) -> Sparsity:
        """Of the layer: the mean over queries and heads."""
        return Sparsity(*(self._sums.sum(1) / self._counts.sum(1)).tolist())

    def add(self, attention: Attention) -> None:
        """Adds the queries of one call, a bounded number at a time."""
        for queries in attention.chunks():
            weights = attention.weights(queries)
            keys = torch.full_like(weights[..., 0], attention.keys, dtype=torch.int64)
            if attention.admit is not None:
                keys = attention.admit(queries).expand(weights.shape).sum(-1)
            counted = keys > 0
            if attention.padding is not None:
                padding = attention.padding[:, queries.to(attention.padding.device)]
                counted = counted & ~padding[:, None]
            self._add(negative_entropy(weights), keys, counted)

    def _add(self, entropy: Tensor, keys: Tensor, counted: Tensor) -> None:
        """Adds negative entropies and numbers of keys where they count, all (N, M, K)."""
        if not counted.any():
            return
        fewest, most = keys[counted].aminmax()
        self.fewest_keys = min(int(fewest), self.fewest_keys or int(fewest))
        self.most_keys = max(int(most), self.most_keys or 0)
        several = counted & (keys > 1)
        share = -entropy.double() / keys.clamp(min=2).double().log()
        for index, (values, mask) in enumerate(((entropy.double(), counted), (share, several))):
            self._sums[index] += values.masked_fill(~mask, 0).sum((0, 2)).cpu()
            self._counts[index] += mask.sum((0, 2)).cpu()


@contextmanager
def record_sparsity(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, LayerSparsity]]:
    """Measures how sparse the attention of layers is while the block runs.

    Sums are kept, not weights: memory does not grow with the number of images, and of a layer with
    many queries and keys a part is computed at a time.

    Args:
        layers: Layers by name; see :func:`attention_layers`.

    Yields:
        Sparsity of each layer by its name, in the order in which the layers first ran.
    """
    record: dict[str, LayerSparsity] = {}

    def see(name: str, attention: Attention) -> None:
        record.setdefault(name, LayerSparsity(name, attention)).add(attention)

    with watch_attention(layers, see):
        yield record

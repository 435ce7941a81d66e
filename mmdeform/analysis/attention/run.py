"""How sparse the attention of a detector is after each epoch of its training."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmengine.dataset import pseudo_collate
from torch import nn

from .checkpoints import Checkpoint, load_weights
from .core import attention_layers
from .sparsity import LayerSparsity, Sparsity, record_sparsity

__all__ = ["MEASURES", "CheckpointSparsity", "measure_run", "summary"]

MEASURES = {
    "negative_entropy": (
        "mean over the queries i of sum_j a_ij log a_ij, natural logarithm, as in arXiv 2011.10881:"
        " -log n if a query attends to its n keys alike, 0 if it attends to one"
    ),
    "normalised_entropy": (
        "mean over the queries of their entropy / log n, for n keys that are not masked: 1 if a"
        " query attends to them alike, 0 if it attends to one; null if no query has several keys"
    ),
}


@dataclass(frozen=True)
class CheckpointSparsity:
    """A checkpoint, and the sparsity of the layers with its weights, by their names."""

    checkpoint: Checkpoint
    layers: Mapping[str, LayerSparsity]


def measure_run(
    model: nn.Module,
    checkpoints: Sequence[Checkpoint],
    samples: Sequence[Any],
    layers: str | Sequence[str] = "**",
    advance: Callable[[], None] = lambda: None,
) -> list[CheckpointSparsity]:
    """Measures the attention of a detector with the weights of each checkpoint.

    Args:
        model: Detector in evaluation mode; it ends up with the weights of the last checkpoint.
        checkpoints: See :func:`order_checkpoints`.
        samples: Images with their data samples, as a data set of mmdet with a test pipeline returns
            them; each is a batch of its own.
        layers: Patterns of names; see :func:`attention_layers`. Default: all.
        advance: Called after each image.

    Raises:
        ValueError: None of the layers runs, or see :func:`attention_layers` and
            :func:`load_weights`.
    """
    chosen = attention_layers(model, layers)
    measured = []
    for checkpoint in checkpoints:
        load_weights(model, checkpoint.path)
        with record_sparsity(chosen) as record:
            for sample in samples:
                model.test_step(pseudo_collate([sample]))
                advance()
        if not record:
            raise ValueError(f"none of the layers runs in a prediction: {', '.join(chosen)}")
        measured.append(CheckpointSparsity(checkpoint, record))
    return measured


def summary(measured: Sequence[CheckpointSparsity]) -> list[dict[str, Any]]:
    """What JSON takes: for each checkpoint all layers, and all heads of each."""
    return [
        {
            "checkpoint": str(one.checkpoint.path),
            "epoch": one.checkpoint.epoch,
            "iteration": one.checkpoint.iteration,
            "layers": {
                name: {
                    "place": layer.place,
                    "kind": layer.kind,
                    "queries": layer.queries,
                    "fewest_keys": layer.fewest_keys,
                    "most_keys": layer.most_keys,
                    **_numbers(layer.mean),
                    "heads": [_numbers(head) for head in layer.heads],
                }
                for name, layer in one.layers.items()
            },
        }
        for one in measured
    ]


def _numbers(sparsity: Sparsity) -> dict[str, float | None]:
    """JSON has no NaN."""
    values = {name: getattr(sparsity, name) for name in MEASURES}
    return {name: None if math.isnan(value) else value for name, value in values.items()}

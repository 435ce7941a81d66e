"""Attention of any layer, dense or deformable: how sparse it is, and where it goes.

    layers = attention_layers(model, "encoder.**")
    with record_sparsity(layers) as record:
        model.test_step(batch)
    record["encoder.layers.0.self_attn"].mean.negative_entropy

    with record_attention(layers) as attentions:
        model.test_step(batch)
    attentions["encoder.layers.0.self_attn"].weights(torch.tensor([0, 7]))

Weights are computed once more beside the forward pass, from the layer's inputs: what the model
returns stays the same to the last bit. Another class of layers joins by a function under
``@attention_of.register(ItsClass)``.
"""

import importlib.util

from . import deformable, dense  # what each class of layers answers  # noqa: F401
from .core import (
    Attention,
    attended,
    attention_layers,
    attention_of,
    is_attention,
    place_of,
    record_attention,
    watch_attention,
)
from .sparsity import LayerSparsity, Sparsity, negative_entropy, record_sparsity

if importlib.util.find_spec("mmdet"):
    from . import mmdet_layers  # noqa: F401

__all__ = [
    "Attention",
    "LayerSparsity",
    "Sparsity",
    "attended",
    "attention_layers",
    "attention_of",
    "is_attention",
    "negative_entropy",
    "place_of",
    "record_attention",
    "record_sparsity",
    "watch_attention",
]

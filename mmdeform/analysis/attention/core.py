"""What an attention layer weighs, and how to ask it: the part that knows no class of layers."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmdeform.layers.names import matches
from mmdeform.layers.sampling import Sampling, call_arguments

__all__ = [
    "Attention",
    "attended",
    "attention_layers",
    "attention_of",
    "is_attention",
    "place_of",
    "record_attention",
    "watch_attention",
]

# Weights that are computed at a time: 16 MB of fp32, a few times that with what they are made of.
MAX_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class Attention:
    """The attention of one call of a layer; its weights are computed when they are asked for.

    ============================== ========================= =================================
    layer                          a query                   its keys
    ============================== ========================= =================================
    multi-head attention           one of Lq                 the Nk that all queries share
    attention within windows       a pixel; N counts windows the pixels of its window
    deformable attention of DAT    a pixel                   Ns sampled points, the same for all
    multi-scale deformable         one of Lq                 its own L * P samples
    DCNv3                          an output pixel           its own K taps; heads are groups
    ============================== ========================= =================================

    Attributes:
        kind: 'dense': queries share their keys; 'deformable': each samples its own; 'taps': the
            same for the window of a convolution.
        self_attention: Whether queries and keys come from the same tensor.
        batch: N.
        heads: M.
        queries: Lq.
        keys: Number of keys of a query, masked ones included.
        weigh: Computes :meth:`weights`.
        admit: Tells which keys queries may attend to: from indices, int64, shape (K,), to bool of a
            shape that broadcasts to (N, M, K, keys). None: to all.
        padding: Queries that lie in the padding of their image, bool, shape (N, Lq). None: none.
        sampling: Where deformable attention samples. None: the layer is none.
    """

    kind: Literal["dense", "deformable", "taps"]
    self_attention: bool
    batch: int
    heads: int
    queries: int
    keys: int
    weigh: Callable[[Tensor], Tensor]
    admit: Callable[[Tensor], Tensor] | None = None
    padding: Tensor | None = None
    sampling: Sampling | None = None

    @torch.no_grad()
    def weights(self, queries: Tensor) -> Tensor:
        """Attention of some queries, before dropout.

        Args:
            queries: Their indices, int64, shape (K,).

        Returns:
            Shape (N, M, K, keys), in fp32 (fp64 for an fp64 layer). Sums to 1 over the keys; NaN
            where a query may attend to no key.

        Raises:
            IndexError: A query does not exist.
        """
        if queries.numel() and not 0 <= int(queries.min()) <= int(queries.max()) < self.queries:
            raise IndexError(
                f"queries must be between 0 and {self.queries - 1}, but got {int(queries.min())} "
                f"to {int(queries.max())}"
            )
        return self.weigh(queries)

    def chunks(self) -> Iterator[Tensor]:
        """Indices of all queries, as many at a time as have :data:`MAX_WEIGHTS` weights."""
        size = max(1, MAX_WEIGHTS // max(1, self.batch * self.heads * self.keys))
        yield from torch.arange(self.queries).split(size)


@functools.singledispatch
def attention_of(module: nn.Module, **inputs: Any) -> Attention:
    """:func:`attended` for one class, with all inputs of the forward call by name."""
    raise TypeError(f"module must be an attention layer, got {type(module).__name__}")


def is_attention(module: nn.Module) -> bool:
    """Whether :func:`attended` knows the class of ``module``."""
    return attention_of.dispatch(type(module)) is not attention_of.dispatch(object)


@torch.no_grad()
def attended(
    module: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Attention:
    """Tells how an attention layer weighs if it is called with ``args`` and ``kwargs``.

    The layer's own projections are computed once more, without gradients and dropout.

    Args:
        module: An attention layer.
        args: Positional arguments of its forward call.
        kwargs: Keyword arguments.

    Raises:
        TypeError: ``module`` is none, or the arguments do not fit its forward.
    """
    return attention_of(module, **call_arguments(module, args, kwargs or {}))


def attention_layers(model: nn.Module, layers: str | Sequence[str] = "**") -> dict[str, nn.Module]:
    """Finds the attention layers of a model by their names.

    Args:
        model: Any model.
        layers: A pattern or several, of which a name has to match one; ``**`` stands for any number
            of parts of a name. Default: all layers.

    Returns:
        Layers by name, in the order of the model. Of a layer in a layer, such as torch's in mmcv's
        ``MultiheadAttention``, the outer one.

    Raises:
        ValueError: The model has no attention layer, or a pattern matches none of them.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        inner = any(".".join(parts[:end]) in found for end in range(len(parts)))
        if is_attention(module) and not inner:
            found[name] = module
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention layer: expected dense attention (torch's or "
            "mmcv's MultiheadAttention, ConditionalAttention, WindowMSA, DeformableAttention2d) or "
            "samples with softmaxed weights (MultiScaleDeformableAttention, DCNv3)"
        )
    chosen: set[str] = set()
    for pattern in [layers] if isinstance(layers, str) else layers:
        matching = {name for name in found if matches(name.split("."), pattern.split("."))}
        if not matching:
            raise ValueError(
                f"layers: {pattern!r} matches no attention layer of {type(model).__name__}; "
                f"there are {', '.join(found)}"
            )
        chosen |= matching
    return {name: module for name, module in found.items() if name in chosen}


@contextmanager
def watch_attention(
    layers: Mapping[str, nn.Module], see: Callable[[str, Attention], None]
) -> Iterator[None]:
    """Calls ``see`` with the name and the attention of a layer after each of its forward calls.

    Outputs, gradients and the state of random numbers stay as they are. Only torch's own
    ``TransformerEncoderLayer`` computes otherwise in evaluation, to rounding: with a hook inside it
    does not take its fused path.

    Args:
        layers: Layers by name; see :func:`attention_layers`.
        see: What to call while the block runs.
    """

    def after(name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        see(name, attended(module, args, kwargs))

    hooks = [
        layer.register_forward_hook(functools.partial(after, name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def record_attention(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Attention]]:
    """Records the attention of layers while the block runs.

    Args:
        layers: Layers by name; see :func:`attention_layers`.

    Yields:
        Attention of each layer by its name, in the order in which the layers ran; of a layer that
        ran more than once the last time.
    """
    record: dict[str, Attention] = {}

    def see(name: str, attention: Attention) -> None:
        record.pop(name, None)
        record[name] = attention

    with watch_attention(layers, see):
        yield record


def place_of(name: str, attention: Attention) -> str:
    """Where in a detector a layer attends: 'encoder self', 'decoder cross', 'backbone', ...

    Args:
        name: Name of the layer in its model.
        attention: Of one of its calls.
    """
    parts = name.split(".")
    for part in ("encoder", "decoder"):
        if part in parts:
            return f"{part} {'self' if attention.self_attention else 'cross'}"
    return parts[0]

"""What a deformable layer samples, and how to ask it: the part that knows no class of layers."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from ..names import matches

__all__ = [
    "Sampling",
    "call_arguments",
    "deformable_layers",
    "is_deformable",
    "map_size",
    "precise",
    "sampled",
    "sampling_of",
    "watch_sampling",
]


@dataclass(frozen=True)
class Sampling:
    """Where one call of a deformable layer sampled, and how it weighed the samples.

    The shape S of the samples is

    ======================================= ========================================
    convolutions                            (N, D, K, Ho, Wo): D deform groups, K taps
    multi-scale deformable attention        (N, Lq, M, L, P): heads, levels, points
    deformable attention of DAT             (N, G, Hk, Wk): groups, keys
    deformable RoI pooling                  (R, Ph, Pw)
    position-sensitive pooling              (R, classes, Ph, Pw)
    ======================================= ========================================

    An RoI pooling layer averages a grid of samples in each bin; the bin stands for them, at the
    mean of their locations.

    Attributes:
        offset: How far (x, y) the layer moved each sample, shape (*S, 2), in pixels of the sampled
            map; for RoI pooling as a fraction of the RoI's width and height.
        locations: Where it sampled, (x, y) in pixels of the sampled map, shape (*S, 2). The first
            pixel has its centre at 0.
        grid: The locations without offsets, of a shape that broadcasts to (*S, 2); for attention
            the reference points.
        size: (width, height) of the sampled map, of a shape that broadcasts to (*S, 2): attention
            has one for each level, or for each query where a query samples its own level only.
        mask: Weight of each sample, shape S; None where the layer has none.
        weighting: What the weights are: 'none'; 'sigmoid': each in (0, 1) by itself; 'softmax':
            they sum to 1 over ``sample_dims``; 'linear': any number.
        sample_dims: Dimensions of S that run over the samples of one output; none for RoI pooling.
    """

    offset: Tensor
    locations: Tensor
    grid: Tensor
    size: Tensor
    mask: Tensor | None = None
    weighting: Literal["none", "sigmoid", "softmax", "linear"] = "none"
    sample_dims: tuple[int, ...] = ()

    @property
    def outside(self) -> Tensor:
        """Which samples lie outside the map, where there is nothing to read; bool, shape S.

        Bilinear interpolation reaches up to one pixel beyond the centres of the border's pixels:
        outside is what does not fulfil -1 < x < width and -1 < y < height, NaN included.
        """
        return ~((self.locations > -1) & (self.locations < self.size)).all(-1)


def is_deformable(module: nn.Module) -> bool:
    """Whether :func:`sampled` knows the class of ``module``."""
    return sampling_of.dispatch(type(module)) is not sampling_of.dispatch(object)


def deformable_layers(model: nn.Module, layers: str | Sequence[str] = "**") -> dict[str, nn.Module]:
    """Finds the deformable layers of a model by their names.

    Args:
        model: Any model.
        layers: A pattern or several, of which a name has to match one. Each part of a name, between
            dots, is matched as a file name is in a shell: ``*``, ``?``, ``[34]``; ``**`` stands for
            any number of parts. Default: all layers.

    Returns:
        Layers by name, in the order of the model.

    Raises:
        ValueError: The model has no deformable layer, or a pattern matches none of them.
    """
    found = {name: module for name, module in model.named_modules() if is_deformable(module)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no deformable layer: expected one of mmdeform, e.g. "
            "type='mmdeform.DCNv2', or of mmcv.ops"
        )
    patterns = [layers] if isinstance(layers, str) else list(layers)
    chosen: set[str] = set()
    for pattern in patterns:
        matching = {name for name in found if matches(name.split("."), pattern.split("."))}
        if not matching:
            raise ValueError(
                f"layers: {pattern!r} matches no deformable layer of {type(model).__name__}; "
                f"there are {', '.join(found)}"
            )
        chosen |= matching
    return {name: module for name, module in found.items() if name in chosen}


def watch_sampling(
    layers: Mapping[str, nn.Module], see: Callable[[str, Sampling], None]
) -> list[RemovableHandle]:
    """Calls ``see`` with the name and the sampling of a layer after each of its forward calls.

    Outputs, gradients, buffers and the state of random numbers stay as they are.

    Args:
        layers: Layers by name; see :func:`deformable_layers`.
        see: What to call.

    Returns:
        Handles of the hooks: to be removed by the caller.
    """

    def after(name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        see(name, sampled(module, args, kwargs))

    return [
        layer.register_forward_hook(functools.partial(after, name), with_kwargs=True)
        for name, layer in layers.items()
    ]


@torch.no_grad()
def sampled(
    module: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Sampling:
    """Tells where a deformable layer samples if it is called with ``args`` and ``kwargs``.

    Offsets and masks are predicted once more, by the layer's own branches, without gradients;
    normalisations on the way see the statistics of the batch where the layer's forward does, but
    do not remember them. A layer with a SyncBatchNorm has to be asked on every process.

    Args:
        module: A deformable layer.
        args: Positional arguments of its forward call.
        kwargs: Keyword arguments.

    Returns:
        What it samples, in fp32 (fp64 for fp64 offsets).

    Raises:
        TypeError: ``module`` is not deformable, or the arguments do not fit its forward.
    """
    with _forgetful_norms(module):
        return sampling_of(module, **call_arguments(module, args, kwargs or {}))


def call_arguments(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a forward call of ``module`` by their names; defaults are left out."""
    signature = _signature(type(module).forward)
    arguments = dict(signature.bind(module, *args, **kwargs).arguments)
    arguments.pop(next(iter(signature.parameters)))  # self
    return arguments


_signature = functools.lru_cache(inspect.signature)


@contextmanager
def _forgetful_norms(module: nn.Module) -> Iterator[None]:
    """Lets normalisations in training use the statistics of the batch without storing them."""
    norms = [
        norm
        for norm in module.modules()
        if isinstance(norm, _NormBase) and norm.training and norm.track_running_stats
    ]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@functools.singledispatch
def sampling_of(module: nn.Module, **inputs: Any) -> Sampling:
    """:func:`sampled` for one class, with all inputs of the forward call by name."""
    raise TypeError(f"module must be a deformable layer, got {type(module).__name__}")


def precise(tensor: Tensor) -> Tensor:
    """Half precision as fp32: at 200 pixels a bf16 coordinate is off by up to 0.4."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def map_size(map: Tensor, like: Tensor) -> Tensor:
    """(width, height) of (N, C, H, W), shape (2,)."""
    return like.new_tensor([map.shape[3], map.shape[2]])

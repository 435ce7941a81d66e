"""Benchmark cases and peers of ms_deform_attn."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdeform import ops

from .case import Case, Inputs, Operator, Peer, off_integers, require

__all__ = ["OPERATOR", "make_case"]

Levels = tuple[tuple[int, int], ...]
# Displaces (..., 2) reference points, in pixels of their level.
Spread = Callable[[Tensor, torch.Generator], Tensor]


def within(radius: float) -> Spread:
    """Samples uniformly within ``radius`` pixels of the reference point along each axis."""

    def spread(points: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.rand(points.shape, generator=generator, dtype=points.dtype)
        return points + radius * (2 * noise - 1)

    return spread


def gaussian(sigma: float) -> Spread:
    """Samples normally around the reference point, ``sigma`` in pixels."""

    def spread(points: Tensor, generator: torch.Generator) -> Tensor:
        return points + sigma * torch.randn(points.shape, generator=generator, dtype=points.dtype)

    return spread


def make_case(
    name: str,
    levels: Levels,
    *,
    queries: int | None = None,
    spread: Spread | None = None,
    heads: int = 8,
    channels: int = 32,
    points: int = 4,
    batches: dict[str, tuple[int, ...]] | None = None,
) -> Case:
    """An encoder layer, where every pixel of every level asks, or a decoder layer.

    Args:
        name: Name of the case.
        levels: (height, width) of each level in pixels.
        queries: Number of queries at random places; None: one at the centre of each pixel.
        spread: How sampling points lie around the query's place; None: uniform over the level.
        heads: Number of heads.
        channels: Channels per head.
        points: Sampling points per head and level.
        batches: See :class:`Case`.
    """

    def make(batch: int, generator: torch.Generator) -> Inputs:
        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        shapes = torch.tensor(levels)
        areas = shapes.prod(1)
        tokens = int(areas.sum())
        places = _pixel_centres(levels) if queries is None else uniform(queries, 2)
        sizes = shapes.flip(1).double()[:, None]  # (L, 1, 2): (width, height)
        shape = (batch, len(places), heads, len(levels), points)
        if spread is None:
            positions = uniform(*shape, 2) * sizes - 0.5
        else:
            pixels = places[:, None, None, None] * sizes - 0.5  # (Lq, 1, L, 1, 2)
            positions = spread(pixels.expand(*shape, 2), generator)
        logits = torch.randn(shape, generator=generator, dtype=torch.float64)
        value = torch.randn(
            (batch, tokens, heads, channels), generator=generator, dtype=torch.float64
        )
        return {
            "value": value,
            "spatial_shapes": shapes,
            "level_start_index": areas.cumsum(0) - areas,
            "sampling_locations": (off_integers(positions) + 0.5) / sizes,
            "attention_weights": logits.flatten(3).softmax(-1).view(shape),
        }

    return Case(name, make, batches or {})


def _pixel_centres(levels: Levels) -> Tensor:
    """Centres (x, y) of all pixels of all levels, normalised to [0, 1], shape (S, 2)."""
    centres = []
    for height, width in levels:
        y = (torch.arange(height, dtype=torch.float64) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float64) + 0.5) / width
        centres.append(torch.cartesian_prod(y, x).flip(1))
    return torch.cat(centres)


def _split(inputs: Inputs) -> Iterator[tuple[Inputs, tuple[slice, ...]]]:
    batch, queries = inputs["sampling_locations"].shape[:2]
    for image in range(batch):
        for first in range(0, queries, 2048):
            piece = (slice(image, image + 1), slice(first, first + 2048))
            parts = {
                "value": inputs["value"][piece[0]],
                "sampling_locations": inputs["sampling_locations"][piece],
                "attention_weights": inputs["attention_weights"][piece],
            }
            yield {**inputs, **parts}, piece


def _samples(inputs: Inputs) -> int:
    return inputs["attention_weights"].numel() * inputs["value"].shape[3]


def _load_mmcv(device_type: str) -> Callable[..., Tensor]:
    module = require("mmcv.ops.multi_scale_deform_attn")
    if device_type == "cpu":  # what mmcv's layer calls there

        def call(
            value: Tensor,
            spatial_shapes: Tensor,
            level_start_index: Tensor,
            sampling_locations: Tensor,
            attention_weights: Tensor,
        ) -> Tensor:
            return module.multi_scale_deformable_attn_pytorch(
                value, spatial_shapes, sampling_locations, attention_weights
            )

    else:

        def call(
            value: Tensor,
            spatial_shapes: Tensor,
            level_start_index: Tensor,
            sampling_locations: Tensor,
            attention_weights: Tensor,
        ) -> Tensor:
            return module.MultiScaleDeformableAttnFunction.apply(
                value, spatial_shapes, level_start_index, sampling_locations, attention_weights, 64
            )

    return call


def _load_grid_sample(device_type: str) -> Callable[..., Tensor]:
    return grid_sample_composition


def grid_sample_composition(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """What one writes without the operator: F.grid_sample per level, weighted as it goes."""
    batch, _, heads, channels = value.shape
    sizes = spatial_shapes.tolist()
    maps = value.permute(0, 2, 3, 1).flatten(0, 1)  # (N*M, Dh, S)
    grid = (2 * sampling_locations - 1).transpose(1, 2).flatten(0, 1)  # (N*M, Lq, L, P, 2)
    weights = attention_weights.transpose(1, 2).flatten(0, 1)  # (N*M, Lq, L, P)
    levels = maps.split([height * width for height, width in sizes], dim=2)
    output = None
    for level, (height, width) in enumerate(sizes):
        pixels = levels[level].unflatten(2, (height, width))
        samples = F.grid_sample(pixels, grid[:, :, level], align_corners=False)
        term = (samples * weights[:, None, :, level]).sum(-1)  # (N*M, Dh, Lq)
        output = term if output is None else output + term
    assert output is not None, "spatial_shapes: expected at least one level"
    return output.view(batch, heads * channels, -1).transpose(1, 2).contiguous()


def _load_reference(device_type: str) -> Callable[..., Tensor]:
    return ops.ms_deform_attn_reference


# Strides 16 to 128 of an image of 800 x 1333 pixels, and strides 8 to 64 (Deformable DETR).
_SMALL: Levels = ((50, 84), (25, 42), (13, 21), (7, 11))
_R50: Levels = ((100, 167), (50, 84), (25, 42), (13, 21))
_CPU = {"cpu": (1,)}
_ENCODER = {"cuda": (1, 2, 4)}
_DECODER = {"cuda": (1, 2)}

OPERATOR = Operator(
    name="ms_deform_attn",
    function=ops.ms_deform_attn,
    reference=ops.ms_deform_attn_reference,
    coordinates=("sampling_locations", "attention_weights"),
    split=_split,
    samples=_samples,
    peers=(
        Peer("mmcv", _load_mmcv, copies=8),
        Peer("grid_sample", _load_grid_sample, copies=8),
        Peer("reference", _load_reference, coordinates_as_data=False, copies=30),
    ),
    cases=(
        make_case("encoder-50x84-within2px", _SMALL, spread=within(2), batches=_CPU),
        make_case("encoder-50x84-uniform", _SMALL, batches=_CPU),
        make_case("encoder-100x167-sigma2px", _R50, spread=gaussian(2), batches=_ENCODER),
        make_case("encoder-100x167-uniform", _R50, batches=_ENCODER),
        make_case("decoder-300-sigma2px", _R50, queries=300, spread=gaussian(2), batches=_DECODER),
        make_case("decoder-900-sigma2px", _R50, queries=900, spread=gaussian(2), batches=_DECODER),
        make_case("encoder-100x167-sigma1px", _R50, spread=gaussian(1)),
        make_case("encoder-100x167-sigma3px", _R50, spread=gaussian(3)),
        make_case("decoder-300-uniform", _R50, queries=300),
    ),
)

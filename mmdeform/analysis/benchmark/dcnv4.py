"""Benchmark cases and peers of dcnv4."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdeform import ops

from . import dcnv3
from .case import Case, Inputs, Operator, Peer

__all__ = ["OPERATOR", "make_case"]

_TAPS = 9


def make_case(
    name: str,
    size: int,
    channels: int,
    *,
    group_channels: int = 16,
    batches: dict[str, tuple[int, ...]] | None = None,
) -> Case:
    """As :func:`dcnv3.make_case`, with offsets and weights in one tensor."""
    case = dcnv3.make_case(name, size, channels, group_channels=group_channels)

    def make(batch: int, generator: torch.Generator) -> Inputs:
        inputs = case.make(batch, generator)
        groups = inputs["groups"]
        parts = [inputs.pop(key).unflatten(3, (groups, -1)) for key in ("offset", "mask")]
        points = torch.cat(parts, 4).flatten(3)
        inputs["offset_mask"] = F.pad(points, (0, -points.shape[3] % 8))
        return inputs

    return Case(name, make, batches or {})


def _reference(input: Tensor, offset_mask: Tensor, groups: int) -> Tensor:
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1], groups, 1.0, False)
    return ops.dcnv4_reference(input, offset_mask, *geometry)


def _split(inputs: Inputs) -> Iterator[tuple[Inputs, tuple[slice, ...]]]:
    for image in range(len(inputs["input"])):
        piece = slice(image, image + 1)
        parts = {name: inputs[name][piece] for name in ("input", "offset_mask")}
        yield {**inputs, **parts}, (piece,)


def _samples(inputs: Inputs) -> int:
    return inputs["input"].numel() * _TAPS


def _load_grid_sample(device_type: str) -> Callable[..., Tensor]:
    def call(input: Tensor, offset_mask: Tensor, groups: int) -> Tensor:
        points = offset_mask[..., : 3 * groups * _TAPS].unflatten(3, (groups, 3 * _TAPS))
        offset, mask = points.split((2 * _TAPS, _TAPS), 4)
        return dcnv3.grid_sample_composition(input, offset.flatten(3), mask.flatten(3), groups)

    return call


def _load_conv2d(device_type: str) -> Callable[..., Tensor]:
    return dcnv3.depthwise_conv2d


def _load_reference(device_type: str) -> Callable[..., Tensor]:
    return _reference


OPERATOR = Operator(
    name="dcnv4",
    function=ops.dcnv4,
    reference=_reference,
    coordinates=("offset_mask",),
    split=_split,
    samples=_samples,
    peers=(
        Peer("grid_sample", _load_grid_sample, copies=4),
        Peer("F.conv2d", _load_conv2d, same_function=False),
        Peer("reference", _load_reference, coordinates_as_data=False, copies=12),
    ),
    cases=tuple(
        make_case(name, size, channels, batches=batches)
        for name, size, channels, batches in dcnv3.STAGES
    ),
)

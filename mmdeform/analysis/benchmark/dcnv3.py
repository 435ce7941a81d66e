"""Benchmark cases and peers of dcnv3."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdeform import ops

from .case import Case, Inputs, Operator, Peer, off_integers

__all__ = ["OPERATOR", "STAGES", "depthwise_conv2d", "grid_sample_composition", "make_case"]

_KERNEL_SIZE = 3


def make_case(
    name: str,
    size: int,
    channels: int,
    *,
    group_channels: int = 16,
    batches: dict[str, tuple[int, ...]] | None = None,
) -> Case:
    """A block of a backbone: 3 x 3 taps at stride 1, offsets with sigma 2 pixels.

    Args:
        name: Name of the case.
        size: Rows and columns of the map.
        channels: Channels of the map.
        group_channels: Channels per group.
        batches: See :class:`Case`.
    """

    def make(batch: int, generator: torch.Generator) -> Inputs:
        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        groups, taps = channels // group_channels, _KERNEL_SIZE**2
        points = (batch, size, size, groups, taps)
        return {
            "input": randn(batch, size, size, channels),
            "offset": off_integers(2 * randn(*points, 2)).flatten(3),
            "mask": randn(*points).softmax(-1).flatten(3),
            "groups": groups,
        }

    return Case(name, make, batches or {})


def _reference(input: Tensor, offset: Tensor, mask: Tensor, groups: int) -> Tensor:
    geometry = ([_KERNEL_SIZE] * 2, [1, 1], [1, 1], [1, 1], groups, 1.0, False)
    return ops.dcnv3_reference(input, offset, mask, *geometry)


def _split(inputs: Inputs) -> Iterator[tuple[Inputs, tuple[slice, ...]]]:
    for image in range(len(inputs["input"])):
        piece = slice(image, image + 1)
        parts = {name: inputs[name][piece] for name in ("input", "offset", "mask")}
        yield {**inputs, **parts}, (piece,)


def _samples(inputs: Inputs) -> int:
    return inputs["input"].numel() * _KERNEL_SIZE**2


def _load_grid_sample(device_type: str) -> Callable[..., Tensor]:
    return grid_sample_composition


def grid_sample_composition(input: Tensor, offset: Tensor, mask: Tensor, groups: int) -> Tensor:
    """What one writes without the operator: F.grid_sample for each group, weighted as it goes."""
    batch, height, width, channels = input.shape
    taps = _KERNEL_SIZE**2
    steps = torch.arange(_KERNEL_SIZE, device=input.device) - _KERNEL_SIZE // 2
    rows = torch.arange(height, device=input.device).view(-1, 1, 1, 1)
    columns = torch.arange(width, device=input.device).view(-1, 1, 1)
    offset = offset.view(batch, height, width, groups, taps, 2)
    # Taps are column-major.
    x = columns + steps.repeat_interleave(_KERNEL_SIZE) + offset[..., 0]
    y = rows + steps.repeat(_KERNEL_SIZE) + offset[..., 1]
    # align_corners=False: pixel p is at (2 * p + 1) / size - 1.
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)
    grid = grid.permute(0, 3, 1, 2, 4, 5).reshape(batch * groups, height * width, taps, 2)
    images = input.unflatten(3, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)
    samples = F.grid_sample(images, grid.to(input.dtype), align_corners=False)
    weights = mask.view(batch, height * width, groups, taps).transpose(1, 2).flatten(0, 1)
    output = (samples * weights[:, None]).sum(-1)  # (N*G, C/G, H*W)
    return output.view(batch, channels, height, width).permute(0, 2, 3, 1).contiguous()


def _load_conv2d(device_type: str) -> Callable[..., Tensor]:
    return depthwise_conv2d


def depthwise_conv2d(input: Tensor, **_: object) -> Tensor:
    """A plain depthwise convolution of the same shape, in the same memory layout."""
    channels = input.shape[3]
    weight = input.new_ones(channels, 1, _KERNEL_SIZE, _KERNEL_SIZE)
    output = F.conv2d(input.permute(0, 3, 1, 2), weight, padding=1, groups=channels)
    return output.permute(0, 2, 3, 1)


def _load_reference(device_type: str) -> Callable[..., Tensor]:
    return _reference


# (name, size, channels, default batches): the stages of a backbone at 224 x 224 pixels, narrow as
# in the smallest models for the CPU, and as in the paper of DCNv4 for a GPU.
STAGES = tuple(
    (f"{size}x{size}x{channels * factor}", size, channels * factor, {device: (batch,)})
    for device, batch, factor in (("cpu", 4, 1), ("cuda", 64, 2))
    for size, channels in ((56, 64), (28, 128), (14, 256), (7, 512))
)

OPERATOR = Operator(
    name="dcnv3",
    function=ops.dcnv3,
    reference=_reference,
    coordinates=("offset", "mask"),
    split=_split,
    samples=_samples,
    peers=(
        Peer("grid_sample", _load_grid_sample, copies=4),
        Peer("F.conv2d", _load_conv2d, same_function=False),
        Peer("reference", _load_reference, coordinates_as_data=False, copies=12),
    ),
    cases=tuple(
        make_case(name, size, channels, batches=batches) for name, size, channels, batches in STAGES
    ),
)

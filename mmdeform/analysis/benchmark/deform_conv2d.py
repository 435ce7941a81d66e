"""Benchmark cases and peers of deform_conv2d."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdeform import ops

from .case import Case, Inputs, Operator, Peer, off_integers, require

__all__ = ["OPERATOR", "make_case"]

OFFSET_SIGMA = 2.0  # pixels


def make_case(
    name: str,
    channels: int,
    height: int,
    width: int,
    *,
    modulated: bool = True,
    stride: int = 1,
    dilation: int = 1,
    deform_groups: int = 1,
    batches: dict[str, tuple[int, ...]] | None = None,
) -> Case:
    """A 3x3 layer with as many output as input channels, padded to keep the size at stride 1.

    Args:
        name: Name of the case.
        channels: Input and output channels.
        height: Input height in pixels.
        width: Input width in pixels.
        modulated: With a mask (v2).
        stride: Of the convolution, in pixels.
        dilation: Of the convolution, in pixels.
        deform_groups: Groups of channels with offsets of their own.
        batches: See :class:`Case`.
    """

    def make(batch: int, generator: torch.Generator) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        out_h, out_w = ((size - 1) // stride + 1 for size in (height, width))
        mask = normal(batch, deform_groups * 9, out_h, out_w).sigmoid() if modulated else None
        offset = OFFSET_SIGMA * normal(batch, deform_groups * 18, out_h, out_w)
        return {
            "input": normal(batch, channels, height, width),
            "offset": off_integers(offset),
            "mask": mask,
            "weight": normal(channels, channels, 3, 3) / (9 * channels) ** 0.5,
            "stride": stride,
            "padding": dilation,
            "dilation": dilation,
        }

    return Case(name, make, batches or {})


def _pairs(*values: int) -> tuple[list[int], ...]:
    return tuple([value, value] for value in values)


def _deform_groups(offset: Tensor, weight: Tensor) -> int:
    return offset.shape[1] // (2 * weight.shape[2] * weight.shape[3])


def _reference(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    stride: int,
    padding: int,
    dilation: int,
) -> Tensor:
    return ops.deform_conv2d_reference(
        input,
        offset,
        mask,
        weight,
        None,
        *_pairs(stride, padding, dilation),
        groups=1,
        deform_groups=_deform_groups(offset, weight),
    )


def _split(inputs: Inputs) -> Iterator[tuple[Inputs, tuple[slice, ...]]]:
    for image in range(inputs["input"].shape[0]):
        piece = slice(image, image + 1)
        parts = {
            name: inputs[name][piece]
            for name in ("input", "offset", "mask")
            if inputs[name] is not None
        }
        yield {**inputs, **parts}, (piece,)


def _samples(inputs: Inputs) -> int:
    taps = inputs["weight"].shape[2] * inputs["weight"].shape[3]
    batch, _, out_h, out_w = inputs["offset"].shape
    return batch * inputs["input"].shape[1] * taps * out_h * out_w


def _load_mmcv(device_type: str) -> Callable[..., Tensor]:
    mmcv = require("mmcv.ops")

    def call(
        input: Tensor,
        offset: Tensor,
        mask: Tensor | None,
        weight: Tensor,
        stride: int,
        padding: int,
        dilation: int,
    ) -> Tensor:
        geometry = (stride, padding, dilation, 1, _deform_groups(offset, weight))
        if mask is None:
            return mmcv.deform_conv2d(input, offset, weight, *geometry)
        return mmcv.modulated_deform_conv2d(input, offset, mask, weight, None, *geometry)

    return call


def _load_torchvision(device_type: str) -> Callable[..., Tensor]:
    # Without torchvision's C++ operators the import works and the call raises: shown as absent.
    return require("torchvision.ops").deform_conv2d


def _load_grid_sample(device_type: str) -> Callable[..., Tensor]:
    return grid_sample_composition


def grid_sample_composition(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    stride: int,
    padding: int,
    dilation: int,
) -> Tensor:
    """What one writes without a deformable operator: F.grid_sample, a mask and a matrix product."""
    batch, channels, height, width = input.shape
    out_channels, _, kernel_h, kernel_w = weight.shape
    groups, taps = _deform_groups(offset, weight), kernel_h * kernel_w
    out_h, out_w = offset.shape[2:]

    def steps(count: int, step: int) -> Tensor:
        return torch.arange(count, device=input.device, dtype=offset.dtype) * step

    tap_y = steps(kernel_h, dilation).repeat_interleave(kernel_w)[:, None, None]
    tap_x = steps(kernel_w, dilation).repeat(kernel_h)[:, None, None]
    y = tap_y + steps(out_h, stride)[:, None] - padding  # (T, Ho, 1)
    x = tap_x + steps(out_w, stride) - padding  # (T, 1, Wo)
    offset = offset.view(batch * groups, taps, 2, out_h, out_w)
    # align_corners=False: pixel p is at (2 * p + 1) / size - 1.
    grid = torch.stack(
        (
            (2 * (x + offset[:, :, 1]) + 1) / width - 1,
            (2 * (y + offset[:, :, 0]) + 1) / height - 1,
        ),
        dim=-1,
    )
    columns = F.grid_sample(
        input.view(batch * groups, channels // groups, height, width),
        grid.view(batch * groups, taps, out_h * out_w, 2),
        align_corners=False,
    )
    if mask is not None:
        columns = columns * mask.view(batch * groups, 1, taps, out_h * out_w)
    columns = columns.view(batch, channels * taps, out_h * out_w)
    return (weight.view(out_channels, -1) @ columns).view(batch, out_channels, out_h, out_w)


def _load_conv2d(device_type: str) -> Callable[..., Tensor]:
    def call(
        input: Tensor, weight: Tensor, stride: int, padding: int, dilation: int, **_: Any
    ) -> Tensor:
        return F.conv2d(input, weight, None, stride, padding, dilation)

    return call


def _load_reference(device_type: str) -> Callable[..., Tensor]:
    return _reference


_DEFAULT = {"cpu": (1,), "cuda": (2,)}
_CUDA = {"cuda": (2,)}

OPERATOR = Operator(
    name="deform_conv2d",
    function=ops.deform_conv2d,
    reference=_reference,
    coordinates=("offset", "mask"),
    split=_split,
    samples=_samples,
    peers=(
        Peer("mmcv", _load_mmcv, copies=3),
        Peer("torchvision", _load_torchvision, copies=3),
        Peer("grid_sample", _load_grid_sample, copies=6),
        Peer("reference", _load_reference, coordinates_as_data=False, copies=30),
        Peer("F.conv2d", _load_conv2d, same_function=False),
    ),
    cases=(
        make_case("v2-c3-128x100x167", 128, 100, 167, batches=_CUDA),
        make_case("v2-c4-256x50x84", 256, 50, 84, batches=_DEFAULT),
        make_case("v2-c5-512x25x42", 512, 25, 42, batches=_CUDA),
        make_case("v1-c3-128x100x167", 128, 100, 167, modulated=False, batches=_CUDA),
        make_case("v1-c4-256x50x84", 256, 50, 84, modulated=False, batches=_DEFAULT),
        make_case("v1-c5-512x25x42", 512, 25, 42, modulated=False, batches=_CUDA),
        make_case("v2-c4-256x50x84-deform-groups4", 256, 50, 84, deform_groups=4),
        make_case("v2-c4-256x50x84-stride2", 256, 50, 84, stride=2),
        make_case("v2-c4-256x50x84-dilation2", 256, 50, 84, dilation=2),
    ),
)

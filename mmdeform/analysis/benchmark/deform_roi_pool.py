"""Benchmark cases and peers of deform_roi_pool."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdeform import ops

from .case import Case, Inputs, Operator, Peer, off_integers, require

__all__ = ["OPERATOR", "make_case"]

_BINS = 7
_GAMMA = 0.1


def make_case(
    name: str,
    height: int,
    width: int,
    stride: int,
    *,
    channels: int = 256,
    rois: int = 512,
    offset: bool = True,
    mask: bool = False,
    sampling_ratio: int = 2,
    batches: dict[str, tuple[int, ...]] | None = None,
) -> Case:
    """RoIs of one level of a feature pyramid, 7 x 7 bins.

    Args:
        name: Name of the case.
        height: Rows of the feature map.
        width: Columns of the feature map.
        stride: Image pixels per pixel of the map.
        channels: Channels of the map.
        rois: Number of RoIs, spread over the images; bins of 1 to 4 pixels of the map, which is
            what a pyramid assigns to a level.
        offset: Bins are displaced, normally with sigma 2 pixels of the map (deformable); else the
            operator is RoIAlign.
        mask: Bins are weighed (v2).
        sampling_ratio: Samples per bin and axis; at most 2 keeps them off integer lines.
        batches: See :class:`Case`.
    """

    def make(batch: int, generator: torch.Generator) -> Inputs:
        def random(sample: Callable[..., Tensor], *shape: int) -> Tensor:
            return sample(shape, generator=generator, dtype=torch.float64)

        # With whole pixels per bin, samples lie at start + n / 4 pixels, and with offsets of half
        # pixels all of them stay off integer lines if 4 * start is off the integers.
        bins = torch.randint(1, 5, (rois, 2), generator=generator).double()  # (x, y)
        size = _BINS * bins
        room = (torch.tensor([width, height]) - size).clamp(min=0)
        start = off_integers(4 * random(torch.rand, rois, 2) * room, 0.2) / 4
        corners = torch.cat((start, start + size), 1) * stride
        image = torch.arange(rois, dtype=torch.float64).mul(batch / rois).floor()[:, None]
        inputs: Inputs = {
            "input": random(torch.randn, batch, channels, height, width),
            "rois": torch.cat((image, corners), 1),
            "offset": None,
            "mask": None,
            "output_size": (_BINS, _BINS),
            "spatial_scale": 1 / stride,
            "sampling_ratio": sampling_ratio,
            "gamma": _GAMMA,
        }
        if offset:
            pixels = (4 * random(torch.randn, rois, 2, _BINS, _BINS)).round() / 2
            inputs["offset"] = pixels / (_GAMMA * size[:, :, None, None])
        if mask:
            inputs["mask"] = random(torch.rand, rois, _BINS, _BINS)
        return inputs

    return Case(name, make, batches or {})


def _reference(
    input: Tensor, rois: Tensor, offset: Tensor | None, mask: Tensor | None, **geometry: Any
) -> Tensor:
    return ops.deform_roi_pool_reference(input, rois, offset, mask, **geometry)


def _split(inputs: Inputs) -> Iterator[tuple[Inputs, tuple[slice, ...]]]:
    for first in range(0, len(inputs["rois"]), 64):
        piece = slice(first, first + 64)
        parts = {
            name: inputs[name][piece]
            for name in ("rois", "offset", "mask")
            if inputs[name] is not None
        }
        yield {**inputs, **parts}, (piece,)


def _samples(inputs: Inputs) -> int:
    bins = len(inputs["rois"]) * _BINS * _BINS
    return bins * inputs["sampling_ratio"] ** 2 * inputs["input"].shape[1]


def _load_mmcv(device_type: str) -> Callable[..., Tensor]:
    mmcv = require("mmcv.ops")

    def call(
        input: Tensor,
        rois: Tensor,
        offset: Tensor | None,
        mask: Tensor | None,
        output_size: tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int,
        gamma: float,
    ) -> Tensor:
        rois = rois.to(input.dtype)
        output = mmcv.deform_roi_pool(
            input, rois, offset, output_size, spatial_scale, sampling_ratio, gamma
        )
        return output if mask is None else output * mask[:, None]

    return call


def _load_mmcv_roi_align(device_type: str) -> Callable[..., Tensor]:
    mmcv = require("mmcv.ops")

    def call(
        input: Tensor,
        rois: Tensor,
        output_size: tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int,
        **_: Any,
    ) -> Tensor:
        rois = rois.to(input.dtype)
        return mmcv.roi_align(input, rois, output_size, spatial_scale, sampling_ratio, "avg", True)

    return call


def _load_torchvision_roi_align(device_type: str) -> Callable[..., Tensor]:
    torchvision = require("torchvision.ops")

    def call(
        input: Tensor,
        rois: Tensor,
        output_size: tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int,
        **_: Any,
    ) -> Tensor:
        rois = rois.to(input.dtype)
        return torchvision.roi_align(
            input, rois, output_size, spatial_scale, sampling_ratio, aligned=True
        )

    return call


def _load_grid_sample(device_type: str) -> Callable[..., Tensor]:
    return grid_sample_composition


def grid_sample_composition(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> Tensor:
    """What one writes without the operator: F.grid_sample for each image, then a mean."""
    bins_h, bins_w = output_size
    height, width = input.shape[2:]
    rois = rois.to(input.dtype)
    start = rois[:, 1:3] * spatial_scale - 0.5
    size = rois[:, 3:5] * spatial_scale - 0.5 - start  # (R, 2): (w, h)

    def positions(axis: int, bins: int) -> Tensor:
        """Samples along an axis, shape (R, bins, sampling_ratio)."""
        steps = torch.arange(bins * sampling_ratio, device=input.device, dtype=input.dtype)
        steps = (steps.view(bins, sampling_ratio) + 0.5) / (bins * sampling_ratio)
        return start[:, axis, None, None] + steps * size[:, axis, None, None]

    x = positions(0, bins_w)[:, None, :, None, :]  # (R, 1, Pw, 1, S)
    y = positions(1, bins_h)[:, :, None, :, None]  # (R, Ph, 1, S, 1)
    if offset is not None:
        shift = gamma * offset * size[:, :, None, None]  # (R, 2, Ph, Pw)
        x = x + shift[:, 0, :, :, None, None]
        y = y + shift[:, 1, :, :, None, None]
    x, y = torch.broadcast_tensors(x, y)
    inside = (x >= -1) & (x <= width) & (y >= -1) & (y <= height)
    # align_corners=False: pixel p is at (2 * p + 1) / size - 1.
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)
    output = input.new_empty(len(rois), input.shape[1], bins_h, bins_w)
    for index, image in enumerate(input):
        chosen = rois[:, 0] == index
        pieces = grid[chosen].view(1, -1, sampling_ratio**2, 2)
        samples = F.grid_sample(image[None], pieces, padding_mode="border", align_corners=False)
        samples = samples * inside[chosen].view(1, 1, -1, sampling_ratio**2)
        means = samples.mean(3).view(-1, int(chosen.sum()), bins_h, bins_w)
        output = output.index_put((chosen,), means.transpose(0, 1))
    return output if mask is None else output * mask[:, None]


def _load_reference(device_type: str) -> Callable[..., Tensor]:
    return _reference


_BOTH = {"cpu": (1,), "cuda": (2,)}
_CUDA = {"cuda": (2,)}

OPERATOR = Operator(
    name="deform_roi_pool",
    function=ops.deform_roi_pool,
    reference=_reference,
    coordinates=("offset", "mask"),
    constants=("rois",),
    split=_split,
    samples=_samples,
    peers=(
        Peer("mmcv", _load_mmcv, copies=1),
        Peer("grid_sample", _load_grid_sample, copies=4),
        Peer("reference", _load_reference, coordinates_as_data=False, copies=10),
        Peer("mmcv RoIAlign", _load_mmcv_roi_align, same_function=False),
        Peer("torchvision RoIAlign", _load_torchvision_roi_align, same_function=False),
    ),
    cases=(
        # On the CPU not by default: on this map the reference in fp64 takes minutes.
        make_case("v2-p2-200x336", 200, 336, 4, mask=True, batches=_CUDA),
        make_case("v2-p4-50x84", 50, 84, 16, mask=True, batches=_BOTH),
        make_case("v1-p2-200x336", 200, 336, 4, batches=_CUDA),
        make_case("v1-p4-50x84", 50, 84, 16, batches=_CUDA),
        make_case("plain-p2-200x336", 200, 336, 4, offset=False),
        make_case("plain-p4-50x84", 50, 84, 16, offset=False, batches={"cpu": (1,)}),
    ),
)

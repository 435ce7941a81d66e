"""What the tests of dcnv3 and dcnv4 share: both sample alike and take their arguments apart alike.

Arguments are those of dcnv3; :func:`merge` makes dcnv4's of them.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .contracts.operator import Arguments, Case, off_integer_lines

TENSORS = ("input", "offset", "mask")


def tap_grid(kernel_size: tuple, dilation: tuple, remove_center: bool) -> tuple[Tensor, Tensor]:
    """(x, y) of each tap relative to the kernel's centre in pixels, (K, 2), and its (ix, iy)."""
    indices = [(ix, iy) for ix in range(kernel_size[1]) for iy in range(kernel_size[0])]
    if remove_center:
        indices.remove((kernel_size[1] // 2, kernel_size[0] // 2))
    taps = torch.tensor(indices).view(-1, 2)
    centers = [dilation[axis] * (kernel_size[axis] - 1) // 2 for axis in (1, 0)]
    return (taps * torch.tensor(dilation).flip(0) - torch.tensor(centers)).double(), taps


def out_size(arguments: Arguments, size: tuple[int, int]) -> tuple[int, ...]:
    keys = ("kernel_size", "stride", "padding", "dilation")
    return tuple(
        (extent + 2 * p - d * (k - 1) - 1) // s + 1
        for extent, k, s, p, d in zip(size, *(arguments[key] for key in keys), strict=True)
    )


def make(
    batch: int = 2,
    size: tuple[int, int] = (7, 6),
    groups: int = 3,
    group_channels: int = 5,
    kernel_size: tuple[int, int] = (3, 2),
    stride: tuple[int, int] = (2, 1),
    padding: tuple[int, int] = (1, 0),
    dilation: tuple[int, int] = (2, 1),
    offset_scale: float = 1.25,
    remove_center: bool = False,
) -> Arguments:
    """Random arguments; samples stray by up to three pixels, so some lie outside."""
    geometry = dict(
        kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation, groups=groups,
        offset_scale=offset_scale, remove_center=remove_center,
    )  # fmt: skip
    grid, _ = tap_grid(kernel_size, dilation, remove_center)
    shape = (batch, *out_size(geometry, size), groups, len(grid))
    # Whole pixels from where the tap stands, so that positions are off integer lines at any scale.
    moved = (offset_scale * grid).round() + off_integer_lines(*shape, 2)
    double = {"dtype": torch.float64}
    return {
        "input": torch.randn(batch, *size, groups * group_channels, **double),
        "offset": (moved / offset_scale - grid).flatten(3),
        "mask": (torch.rand(shape, **double) + 0.2).flatten(3),
        **geometry,
    }


PLAIN = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), kernel_size=(3, 3), offset_scale=1.0)

GEOMETRIES: dict[str, dict[str, Any]] = {
    # Swapped axes would show; odd numbers of channels per group.
    "asymmetric": {},
    "tiny": dict(size=(4, 3), groups=2, group_channels=2),
    "plain-3x3": dict(**PLAIN, groups=2, group_channels=8),
    "wide-image": dict(size=(3, 11), padding=(2, 1), dilation=(1, 3)),
    "one-pixel": dict(size=(1, 1), padding=(2, 1), dilation=(1, 1), stride=(1, 1)),
    "1x1-kernel": dict(kernel_size=(1, 1), padding=(0, 0), dilation=(1, 1)),
    "5x5-kernel": dict(kernel_size=(5, 5), padding=(2, 2), dilation=(1, 1), groups=2),
    "7x1-kernel": dict(kernel_size=(7, 1), padding=(3, 0), dilation=(1, 1)),
    # The centre is dilation * (kernel - 1) // 2 = (1, 4) pixels: rounded down.
    "even-kernel-odd-dilation": dict(
        kernel_size=(2, 4), dilation=(3, 3), padding=(1, 2), stride=(1, 1), size=(6, 9)
    ),
    "half-scale": dict(offset_scale=0.5),
    "negative-scale": dict(offset_scale=-1.5),
    "remove-center": dict(**PLAIN, remove_center=True),
    "remove-center-5x5": dict(
        kernel_size=(5, 5), dilation=(1, 2), padding=(2, 3), remove_center=True, groups=1
    ),
    "1-group": dict(groups=1),
    "16-groups": dict(groups=16, group_channels=4, size=(4, 4), batch=1),
    "1-channel": dict(groups=1, group_channels=1),
    "1-channel-per-group": dict(groups=5, group_channels=1),
    "16-channels": dict(groups=2, group_channels=16),
    "24-channels": dict(groups=2, group_channels=24, size=(5, 4)),
    "32-channels": dict(groups=2, group_channels=32, size=(5, 4)),
    "64-channels": dict(groups=1, group_channels=64, size=(5, 4)),
    "1-image": dict(batch=1),
    "33-images": dict(batch=33, size=(4, 3), groups=1, group_channels=4),
    "no-image": dict(batch=0),
}
LARGE: dict[str, dict[str, Any]] = {
    "stage": dict(**PLAIN, size=(25, 21), groups=4, group_channels=16),
    "many-groups": dict(**PLAIN, size=(9, 8), groups=16, group_channels=16, batch=3),
    "many-channels": dict(**PLAIN, size=(9, 8), groups=2, group_channels=133, batch=1),
    "long-rows": dict(**PLAIN, size=(3, 120), groups=2, group_channels=4),
}


def merge(offset: Tensor, mask: Tensor, groups: int, padding: float = 0) -> Tensor:
    """``offset_mask`` of dcnv4; the channels that fill it up hold ``padding``."""
    size, taps = mask.shape[:3], mask.shape[3] // groups
    parts = [offset.view(*size, groups, 2 * taps), mask.view(*size, groups, taps)]
    merged = torch.cat(parts, 4).flatten(3)
    return F.pad(merged, (0, -merged.shape[3] % 8), value=padding)


def merged(arguments: Arguments) -> Arguments:
    """The arguments of dcnv4 for those of dcnv3."""
    rest = {key: value for key, value in arguments.items() if key not in TENSORS}
    offset_mask = merge(arguments["offset"], arguments["mask"], arguments["groups"], padding=7)
    return {"input": arguments["input"], "offset_mask": offset_mask, **rest}


def cases(convert: Callable[[Arguments], Arguments] = dict) -> dict[str, Case]:
    """Cases of the contract; ``convert`` makes an operator's arguments of dcnv3's."""

    def case(geometry: dict, emulated: bool) -> Case:
        return Case(lambda: convert(make(**geometry)), emulated)

    return {
        key: case(geometry, key in GEOMETRIES) for key, geometry in (GEOMETRIES | LARGE).items()
    }


def sized(size: int) -> Arguments:
    # No two sizes are equal that differ in general: torch.compile would tie them together.
    return make(batch=3 + size, size=(15 + 4 * size, 25 + 3 * size))


def contended() -> Arguments:
    arguments = make(**PLAIN, size=(33, 30), groups=4, group_channels=16)
    arguments["offset"][:, ::2] = 1e-2  # plain convolution: nine samples at each pixel
    return arguments


def brute_force(arguments: Arguments) -> Tensor:
    """Every pixel of the image, weighted by the tents over its rows and columns."""
    input, offset, mask = (arguments[key] for key in TENSORS)
    batch, height, width, channels = input.shape
    _, out_h, out_w, _ = mask.shape
    groups, scale = arguments["groups"], arguments["offset_scale"]
    kernel_h, kernel_w = arguments["kernel_size"]
    (stride_h, stride_w), (pad_h, pad_w) = arguments["stride"], arguments["padding"]
    dilation_h, dilation_w = arguments["dilation"]
    center_h, center_w = dilation_h * (kernel_h - 1) // 2, dilation_w * (kernel_w - 1) // 2
    output = torch.zeros(batch, out_h, out_w, channels, dtype=torch.float64)
    for n in range(batch):
        for ho in range(out_h):
            for wo in range(out_w):
                point = 0
                for g in range(groups):
                    inside = slice(g * channels // groups, (g + 1) * channels // groups)
                    for ix in range(kernel_w):
                        for iy in range(kernel_h):
                            middle = (ix, iy) == (kernel_w // 2, kernel_h // 2)
                            if arguments["remove_center"] and middle:
                                continue
                            x, y = offset[n, ho, wo, 2 * point : 2 * point + 2].tolist()
                            row = ho * stride_h - pad_h + center_h
                            row += scale * (iy * dilation_h - center_h + y)
                            column = wo * stride_w - pad_w + center_w
                            column += scale * (ix * dilation_w - center_w + x)
                            weight = mask[n, ho, wo, point].item()
                            for r in range(height):
                                for c in range(width):
                                    tent = max(0, 1 - abs(row - r)) * max(0, 1 - abs(column - c))
                                    output[n, ho, wo, inside] += (
                                        weight * tent * input[n, r, c, inside]
                                    )
                            point += 1
    return output

"""Where deformable convolutions sample, of all versions."""

from typing import Any

import torch
from mmcv.ops import deform_conv as mmcv_v1
from mmcv.ops import modulated_deform_conv as mmcv_v2
from torch import Tensor

from mmdeform.ops.dcnv3 import sampling_positions as dcnv3_positions
from mmdeform.ops.deform_conv2d import output_size
from mmdeform.ops.deform_conv2d import sampling_positions as conv_positions

from ..dcn_base import DCNBase
from ..dcnv4 import DCNv4
from .core import Sampling, map_size, precise, sampling_of

__all__ = ["as_mmcv_reads"]


@sampling_of.register(mmcv_v1.DeformConv2d)
@sampling_of.register(mmcv_v2.ModulatedDeformConv2d)
def _conv(module: Any, x: Tensor, offset: Tensor, mask: Tensor | None = None, **_: Any) -> Sampling:
    geometry = (module.kernel_size, module.stride, module.padding, module.dilation)
    offset = precise(offset)
    if mask is not None:
        size = output_size(x.shape[2:], *geometry)
        offset, mask = as_mmcv_reads(offset, size), as_mmcv_reads(mask, size)
    y, x_ = conv_positions(offset, *geometry)
    points = 2 * module.kernel_size[0] * module.kernel_size[1]
    grid_y, grid_x = conv_positions(torch.zeros_like(offset[:1, :points]), *geometry)
    moved = offset.unflatten(1, (*y.shape[1:3], 2)).movedim(3, -1).flip(-1)  # (dy, dx)
    return Sampling(
        offset=moved,
        locations=torch.stack([x_, y], -1),
        grid=torch.stack([grid_x, grid_y], -1),
        size=map_size(x, offset),
        mask=None if mask is None else precise(mask).reshape(y.shape),
        weighting="none" if mask is None else "sigmoid",
        sample_dims=(2,),
    )


def as_mmcv_reads(map: Tensor, size: tuple[int, int]) -> Tensor:
    """What mmcv's v2 makes of offsets and masks that have more pixels than its output has.

    It takes the first numbers of each image for a map of the output's size. mmdet's DyHead hands
    such maps, of the next larger level, to it; our layers refuse them.

    Args:
        map: Offsets or mask, shape (N, channels, H, W).
        size: (Ho, Wo) of the output.

    Returns:
        Shape (N, channels, Ho, Wo); ``map`` itself where it has no more pixels than that.
    """
    count = map.shape[1] * size[0] * size[1]
    if map.shape[1:].numel() <= count:
        return map
    return map.flatten(1)[:, :count].unflatten(1, (map.shape[1], *size))


@sampling_of.register(mmcv_v1.DeformConv2dPack)
@sampling_of.register(mmcv_v2.ModulatedDeformConv2dPack)
def _conv_pack(module: Any, x: Tensor, **_: Any) -> Sampling:
    if hasattr(module, "predict_offset"):
        return _conv(module, x, *module.predict_offset(x))
    if isinstance(module, mmcv_v1.DeformConv2dPack):
        return _conv(module, x, module.conv_offset(x))
    first, second, mask = module.conv_offset(x).chunk(3, dim=1)
    return _conv(module, x, torch.cat((first, second), dim=1), mask.sigmoid())


@sampling_of.register(DCNBase)
def _dcn(module: Any, x: Tensor, **_: Any) -> Sampling:
    offset, mask = (precise(tensor) for tensor in module.predict_offset(x))

    def locations(offset: Tensor) -> Tensor:
        y, x = dcnv3_positions(
            offset, module.kernel_size, module.stride, module.padding, module.dilation,
            module.group, module.offset_scale, module.remove_center,
        )  # fmt: skip
        return _taps_first(torch.stack([x, y], -1))

    moved = offset.unflatten(-1, (module.group, module.taps, 2)) * module.offset_scale
    return Sampling(
        offset=_taps_first(moved),
        locations=locations(offset),
        grid=locations(torch.zeros_like(offset[:1]))[:, :1],
        size=map_size(x.permute(0, 3, 1, 2) if module.channels_last else x, offset),
        mask=_taps_first(mask.unflatten(-1, (module.group, module.taps, 1))).squeeze(-1),
        weighting="linear" if isinstance(module, DCNv4) else "softmax",
        sample_dims=(2,),
    )


def _taps_first(tensor: Tensor) -> Tensor:
    """(N, Ho, Wo, G, K, X) as (N, G, K, Ho, Wo, X)."""
    return tensor.permute(0, 3, 4, 1, 2, 5)

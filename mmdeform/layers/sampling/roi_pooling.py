"""Where deformable RoI pooling samples."""

import importlib
from typing import Any

import torch
from torch import Tensor

from mmdeform.ops._roi import round_half_away

from ..deform_ps_roi_pool import DeformPSRoIPool, DeformPSRoIPoolPack
from .core import Sampling, map_size, precise, sampling_of

# mmcv.ops.deform_roi_pool is the function of this name, which hides its module.
_mmcv_roi = importlib.import_module("mmcv.ops.deform_roi_pool")


@sampling_of.register(_mmcv_roi.DeformRoIPool)
def _roi(
    module: Any,
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None = None,
    mask: Tensor | None = None,
    **_: Any,
) -> Sampling:
    rows, columns = module.output_size
    corners = precise(rois)[:, 1:] * module.spatial_scale - 0.5
    start, extent = corners[:, None, None, :2], (corners[:, 2:] - corners[:, :2])[:, None, None]
    grid = start + extent * _bin_centers(rows, columns, corners)
    moved = torch.zeros_like(grid)
    if offset is not None and offset.numel():
        moved = precise(offset).movedim(1, -1) * module.gamma
    return Sampling(
        offset=moved,
        locations=grid + moved * extent,
        grid=grid,
        size=map_size(input, corners),
        mask=None if mask is None else precise(mask).reshape(grid.shape[:-1]),
        weighting="none" if mask is None else "sigmoid",
    )


@sampling_of.register(_mmcv_roi.DeformRoIPoolPack)
@sampling_of.register(_mmcv_roi.ModulatedDeformRoIPoolPack)
def _roi_pack(module: Any, input: Tensor, rois: Tensor, **_: Any) -> Sampling:
    if hasattr(module, "predict_offset"):
        return _roi(module, input, rois, *module.predict_offset(input, rois))
    pooled = _mmcv_roi.DeformRoIPool.forward(module, input, rois).flatten(1)
    mask = module.mask_fc(pooled) if hasattr(module, "mask_fc") else None
    offset = module.offset_fc(pooled).view(-1, 2, *module.output_size)
    return _roi(module, input, rois, offset, mask)


@sampling_of.register(DeformPSRoIPool)
def _ps_roi(
    module: Any, input: Tensor, rois: Tensor, offset: Tensor | None = None, **_: Any
) -> Sampling:
    rows, columns = module.output_size
    corners = round_half_away(precise(rois)[:, 1:])
    start = (corners[:, :2] * module.spatial_scale - 0.5)[:, None, None, None]
    end = ((corners[:, 2:] + 1) * module.spatial_scale - 0.5)[:, None, None, None]
    extent = (end - start).clamp(min=0.1)
    # The samples of a bin start at its edge, so that their mean lies before its centre.
    early = 0.5 / module.sample_per_part
    scale = corners.new_tensor([columns, rows])
    grid = start + extent * (_bin_centers(rows, columns, corners) - early / scale)
    moved = torch.zeros_like(grid)
    if offset is not None:
        row = torch.arange(rows, device=offset.device) * module.part_size // rows
        column = torch.arange(columns, device=offset.device) * module.part_size // columns
        of_bins = precise(offset)[:, :, row[:, None], column]  # (R, 2 * classes, Ph, Pw)
        moved = of_bins.unflatten(1, (-1, 2)).movedim(2, -1) * module.trans_std
    return Sampling(
        offset=moved, locations=grid + moved * extent, grid=grid, size=map_size(input, corners)
    )


@sampling_of.register(DeformPSRoIPoolPack)
def _ps_roi_pack(module: Any, input: Tensor, rois: Tensor, features: Tensor, **_: Any) -> Sampling:
    return _ps_roi(module, input, rois, module.predict_offset(features, rois))


def _bin_centers(rows: int, columns: int, like: Tensor) -> Tensor:
    """Centres (x, y) of the bins in units of the RoI, shape (Ph, Pw, 2)."""
    y = (torch.arange(rows, device=like.device, dtype=like.dtype) + 0.5) / rows
    x = (torch.arange(columns, device=like.device, dtype=like.dtype) + 0.5) / columns
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)

"""Where deformable attention samples."""

import functools
from typing import Any

import torch
from mmcv.ops import multi_scale_deform_attn as mmcv_msda
from torch import Tensor

from ..dat_attn import DeformableAttention2d
from ..single_level_deform_attn import SingleLevelDeformableAttention
from .core import Sampling, map_size, precise, sampling_of


@sampling_of.register(mmcv_msda.MultiScaleDeformableAttention)
def _attention(
    module: Any,
    query: Tensor,
    reference_points: Tensor,
    spatial_shapes: Tensor,
    query_pos: Tensor | None = None,
    **_: Any,
) -> Sampling:
    predict = getattr(module, "predict_sampling", functools.partial(_mmcv_attention, module))
    query = _positioned(module, query, query_pos)
    locations, weights = predict(query, reference_points, spatial_shapes)
    size = spatial_shapes.flip(-1)[:, None]  # (L, 1, 2)
    return _attention_sampling(locations, weights, reference_points[:, :, None, :, None, :2], size)


@sampling_of.register(SingleLevelDeformableAttention)
def _single_level_attention(
    module: Any,
    query: Tensor,
    reference_points: Tensor,
    spatial_shapes: Tensor,
    query_pos: Tensor | None = None,
    **_: Any,
) -> Sampling:
    query = _positioned(module, query, query_pos)
    locations, weights = module.predict_sampling(query, reference_points, spatial_shapes)
    sizes = module.level_sizes(spatial_shapes)
    points = reference_points.expand(-1, sum(sizes), len(sizes), -1)[..., :2].split(sizes, 1)
    own_points = torch.cat([points[level][:, :, level] for level in range(len(sizes))], 1)
    tokens = torch.tensor(sizes, device=query.device)
    size = spatial_shapes.flip(-1).repeat_interleave(tokens, 0)[:, None, None, None]
    return _attention_sampling(locations, weights, own_points[:, :, None, None, None], size)


def _positioned(module: Any, query: Tensor, query_pos: Tensor | None) -> Tensor:
    """The query from which attention predicts, shape (N, Lq, C)."""
    if query_pos is not None:
        query = query + query_pos
    return query if module.batch_first else query.transpose(0, 1)


def _attention_sampling(
    locations: Tensor, weights: Tensor, points: Tensor, size: Tensor
) -> Sampling:
    """From locations and reference points in [0, 1] and sizes that broadcast to them."""
    size = size.to(locations.dtype)
    locations = locations * size - 0.5
    grid = points.to(locations.dtype) * size - 0.5
    return Sampling(
        offset=locations - grid,
        locations=locations,
        grid=grid,
        size=size,
        mask=weights,
        weighting="softmax",
        sample_dims=(3, 4),
    )


def _mmcv_attention(
    module: Any, query: Tensor, reference_points: Tensor, spatial_shapes: Tensor
) -> tuple[Tensor, Tensor]:
    """Normalised locations and weights as mmcv's layer predicts them."""
    shape = (*query.shape[:2], module.num_heads, module.num_levels, module.num_points)
    offset = precise(module.sampling_offsets(query)).view(*shape, 2)
    weights = precise(module.attention_weights(query)).view(*shape[:3], -1).softmax(-1)
    points = reference_points[:, :, None, :, None].to(offset.dtype)
    if points.shape[-1] == 2:
        offset = offset / spatial_shapes.flip(-1).to(offset.dtype)[:, None]
    else:
        offset = offset / module.num_points * points[..., 2:] * 0.5
    return points[..., :2] + offset, weights.view(shape)


@sampling_of.register(DeformableAttention2d)
def _dat(module: Any, x: Tensor, **_: Any) -> Sampling:
    positions, reference = module.predict_positions(x)
    size = map_size(x, positions)
    # (y, x), where -1 and 1 are the centres of the first and the last pixel.
    locations, grid = ((points.flip(-1) + 1) / 2 * (size - 1) for points in (positions, reference))
    return Sampling(offset=locations - grid, locations=locations, grid=grid, size=size)

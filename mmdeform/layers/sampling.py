"""Where a deformable layer samples: one answer for every class, ours and mmcv's.

    layers = deformable_layers(model, "backbone.**")
    handles = watch_sampling(layers, lambda name, sampling: print(name, sampling.locations))

Everything that looks at offsets, locations or masks asks here. Another class of layers joins by a
function under ``@sampling_of.register(ItsClass)``. Subclasses are included, and whether mmcv's
classes run on mmcv's kernels or on ours makes no difference. Only modules can be asked: not mmdet's
TOOD, which calls ``deform_conv2d`` itself; nor mmcv's SAConv2d, which samples twice.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from mmcv.ops import deform_conv as mmcv_v1
from mmcv.ops import modulated_deform_conv as mmcv_v2
from mmcv.ops import multi_scale_deform_attn as mmcv_msda
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from mmdeform.ops._roi import round_half_away
from mmdeform.ops.dcnv3 import sampling_positions as dcnv3_positions
from mmdeform.ops.deform_conv2d import output_size
from mmdeform.ops.deform_conv2d import sampling_positions as conv_positions

from .dat_attn import DeformableAttention2d
from .dcn_base import DCNBase
from .dcnv4 import DCNv4
from .deform_ps_roi_pool import DeformPSRoIPool, DeformPSRoIPoolPack
from .names import matches
from .single_level_deform_attn import SingleLevelDeformableAttention

__all__ = [
    "Sampling",
    "as_mmcv_reads",
    "call_arguments",
    "deformable_layers",
    "is_deformable",
    "sampled",
    "sampling_of",
    "watch_sampling",
]

# mmcv.ops.deform_roi_pool is the function of this name, which hides its module.
_mmcv_roi = importlib.import_module("mmcv.ops.deform_roi_pool")


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


# --- convolutions ---


@sampling_of.register(mmcv_v1.DeformConv2d)
@sampling_of.register(mmcv_v2.ModulatedDeformConv2d)
def _conv(module: Any, x: Tensor, offset: Tensor, mask: Tensor | None = None, **_: Any) -> Sampling:
    geometry = (module.kernel_size, module.stride, module.padding, module.dilation)
    offset = _precise(offset)
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
        size=_size(x, offset),
        mask=None if mask is None else _precise(mask).reshape(y.shape),
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
    offset, mask = (_precise(tensor) for tensor in module.predict_offset(x))

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
        size=_size(x.permute(0, 3, 1, 2) if module.channels_last else x, offset),
        mask=_taps_first(mask.unflatten(-1, (module.group, module.taps, 1))).squeeze(-1),
        weighting="linear" if isinstance(module, DCNv4) else "softmax",
        sample_dims=(2,),
    )


def _taps_first(tensor: Tensor) -> Tensor:
    """(N, Ho, Wo, G, K, X) as (N, G, K, Ho, Wo, X)."""
    return tensor.permute(0, 3, 4, 1, 2, 5)


# --- attention ---


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
    offset = _precise(module.sampling_offsets(query)).view(*shape, 2)
    weights = _precise(module.attention_weights(query)).view(*shape[:3], -1).softmax(-1)
    points = reference_points[:, :, None, :, None].to(offset.dtype)
    if points.shape[-1] == 2:
        offset = offset / spatial_shapes.flip(-1).to(offset.dtype)[:, None]
    else:
        offset = offset / module.num_points * points[..., 2:] * 0.5
    return points[..., :2] + offset, weights.view(shape)


@sampling_of.register(DeformableAttention2d)
def _dat(module: Any, x: Tensor, **_: Any) -> Sampling:
    positions, reference = module.predict_positions(x)
    size = _size(x, positions)
    # (y, x), where -1 and 1 are the centres of the first and the last pixel.
    locations, grid = ((points.flip(-1) + 1) / 2 * (size - 1) for points in (positions, reference))
    return Sampling(offset=locations - grid, locations=locations, grid=grid, size=size)


# --- RoI pooling ---


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
    corners = _precise(rois)[:, 1:] * module.spatial_scale - 0.5
    start, extent = corners[:, None, None, :2], (corners[:, 2:] - corners[:, :2])[:, None, None]
    grid = start + extent * _bin_centers(rows, columns, corners)
    moved = torch.zeros_like(grid)
    if offset is not None and offset.numel():
        moved = _precise(offset).movedim(1, -1) * module.gamma
    return Sampling(
        offset=moved,
        locations=grid + moved * extent,
        grid=grid,
        size=_size(input, corners),
        mask=None if mask is None else _precise(mask).reshape(grid.shape[:-1]),
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
    corners = round_half_away(_precise(rois)[:, 1:])
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
        of_bins = _precise(offset)[:, :, row[:, None], column]  # (R, 2 * classes, Ph, Pw)
        moved = of_bins.unflatten(1, (-1, 2)).movedim(2, -1) * module.trans_std
    return Sampling(
        offset=moved, locations=grid + moved * extent, grid=grid, size=_size(input, corners)
    )


@sampling_of.register(DeformPSRoIPoolPack)
def _ps_roi_pack(module: Any, input: Tensor, rois: Tensor, features: Tensor, **_: Any) -> Sampling:
    return _ps_roi(module, input, rois, module.predict_offset(features, rois))


def _bin_centers(rows: int, columns: int, like: Tensor) -> Tensor:
    """Centres (x, y) of the bins in units of the RoI, shape (Ph, Pw, 2)."""
    y = (torch.arange(rows, device=like.device, dtype=like.dtype) + 0.5) / rows
    x = (torch.arange(columns, device=like.device, dtype=like.dtype) + 0.5) / columns
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)


# --- shared ---


def _precise(tensor: Tensor) -> Tensor:
    """Half precision as fp32: at 200 pixels a bf16 coordinate is off by up to 0.4."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _size(map: Tensor, like: Tensor) -> Tensor:
    """(width, height) of (N, C, H, W), shape (2,)."""
    return like.new_tensor([map.shape[3], map.shape[2]])

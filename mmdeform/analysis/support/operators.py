"""The gradient with respect to sampling locations, from the graph that autograd keeps.

An operator gets offsets or locations as an input; what its backward node returns for that input is
the gradient by which its samples move. It is read there and not where offsets are predicted: limits
of offsets do not hide it, and what other operators do with the same offsets is not in it.
"""

import functools
import importlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from mmcv.ops import deform_conv as mmcv_v1
from mmcv.ops import modulated_deform_conv as mmcv_v2
from mmcv.ops import multi_scale_deform_attn as mmcv_msda
from torch import Tensor, nn
from torch.autograd.graph import Node as GraphNode

from mmdeform.layers.dat_attn import DeformableAttention2d
from mmdeform.layers.dcn_base import DCNBase
from mmdeform.layers.dcnv4 import DCNv4
from mmdeform.layers.deform_ps_roi_pool import DeformPSRoIPool
from mmdeform.layers.sampling import as_mmcv_reads
from mmdeform.ops._roi import round_half_away
from mmdeform.ops.dcnv4 import split_offset_mask

from ..recording import LayerCall

__all__ = ["coordinate_input", "location_gradient", "operators_of"]

# mmcv.ops.deform_roi_pool is the function of this name, which hides its module.
_mmcv_roi = importlib.import_module("mmcv.ops.deform_roi_pool")

# Backward nodes by name, and which of their inputs, those that are tensors, holds coordinates.
_COORDINATES = {
    "deform_conv2d": 1,
    "DeformConv2dFunction": 1,
    "ModulatedDeformConv2dFunction": 1,
    "dcnv3": 1,
    "dcnv4": 1,
    "deform_roi_pool": 2,
    "DeformRoIPoolFunction": 2,
    "deform_ps_roi_pool": 2,
    "ms_deform_attn": 3,
    "MultiScaleDeformableAttnFunction": 3,
    "GridSampler2DBackward0": 1,  # mmcv's attention on the CPU, DAT's reference
}


def coordinate_input(node: GraphNode) -> int | None:
    """Which input of an operator its offsets or locations are; None of any other node."""
    name = node.name().removesuffix("Backward")
    name = name.removeprefix("GeneratedBackwardFor_mmdeform_").removesuffix("_default")
    return _COORDINATES.get(name.removesuffix("_defaultBackward"))


def operators_of(output: Tensor, inputs: Iterable[Any]) -> list[GraphNode]:
    """The backward nodes of the operators by which a layer made its output from its inputs.

    Of operators behind each other, as of RoI pooling which predicts its offsets from RoIs that it
    pooled without any, the last counts.

    Args:
        output: What the layer returned.
        inputs: What it was called with.

    Returns:
        One node, or several where a layer samples each level by itself, in the order of levels.
    """
    seen = {tensor.grad_fn for tensor in inputs if isinstance(tensor, Tensor)}
    found, stack = [], [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if coordinate_input(node) is not None:
            found.append(node)
        else:
            stack.extend(reversed([parent for parent, _ in node.next_functions]))
    return found


@functools.singledispatch
def location_gradient(layer: nn.Module, call: LayerCall, gradients: Sequence[Tensor]) -> Tensor:
    """Brings gradients of a layer's operators to those of its sampling locations.

    Args:
        layer: A deformable layer.
        call: What it sampled.
        gradients: Of the coordinates that its operators got.

    Returns:
        Per pixel of the image, (x, y), shape of ``call.locations``.

    Raises:
        TypeError: The layer is of no known class.
    """
    raise TypeError(f"{call.name}: expected a deformable layer, got {type(layer).__name__}")


@location_gradient.register(mmcv_v1.DeformConv2d)
@location_gradient.register(mmcv_v2.ModulatedDeformConv2d)
def _conv(layer: Any, call: Any, gradients: Sequence[Tensor]) -> Tensor:
    groups, taps, *size = call.locations.shape[1:-1]
    gradient = as_mmcv_reads(gradients[0], tuple(size)).unflatten(1, (groups, taps, 2))
    return _per_image_pixel(call, gradient.movedim(3, -1).flip(-1))  # (dy, dx)


@location_gradient.register(DCNBase)
def _dcn(layer: Any, call: Any, gradients: Sequence[Tensor]) -> Tensor:
    gradient = gradients[0]
    if isinstance(layer, DCNv4):
        gradient, _ = split_offset_mask(gradient, layer.group, layer.taps)
    gradient = gradient.unflatten(-1, (layer.group, layer.taps, 2)).permute(0, 3, 4, 1, 2, 5)
    return _per_image_pixel(call, gradient / layer.offset_scale)


@location_gradient.register(mmcv_msda.MultiScaleDeformableAttention)
def _attention(layer: Any, call: Any, gradients: Sequence[Tensor]) -> Tensor:
    if gradients[0].dim() == 6:  # (N, Lq, M, L, P, 2), or for each level its own queries
        gradient = torch.cat(list(gradients), 1)
    else:  # of grids in [-1, 1] of each level, (N * M, Lq, P, 2)
        gradient = 2 * torch.stack(list(gradients), 2)  # (N * M, Lq, L, P, 2)
        gradient = gradient.unflatten(0, (-1, layer.num_heads)).transpose(1, 2)
    return gradient / gradient.new_tensor(call.image_size)  # locations are shares of the image


@location_gradient.register(DeformableAttention2d)
def _keys(layer: Any, call: Any, gradients: Sequence[Tensor]) -> Tensor:
    size = call.sampling.size.to(gradients[0])
    if gradients[0].dim() == 6:  # shares of the map, (B, Ns, G, 1, 1, 2)
        gradient = gradients[0][:, :, :, 0, 0].transpose(1, 2) / size
    else:  # of a grid from the first pixel's centre at -1 to the last one's at 1, (B * G, 1, Ns, 2)
        gradient = gradients[0].flatten(1, 2) * 2 / (size - 1).clamp(min=1)
    return _per_image_pixel(call, gradient.reshape(call.locations.shape))


@location_gradient.register(_mmcv_roi.DeformRoIPool)
def _roi_pooling(layer: Any, call: Any, gradients: Sequence[Tensor]) -> Tensor:
    sizes = (call.rois[:, 3:] - call.rois[:, 1:3]).clamp(min=1e-6)
    return gradients[0].movedim(1, -1) / (layer.gamma * sizes[:, None, None])


@location_gradient.register(DeformPSRoIPool)
def _ps_roi_pooling(layer: Any, call: Any, gradients: Sequence[Tensor]) -> Tensor:
    """Bins that share a part, whose offset moves them together, share its gradient."""
    rows, columns = layer.output_size
    device = gradients[0].device
    row = torch.arange(rows, device=device) * layer.part_size // rows
    column = torch.arange(columns, device=device) * layer.part_size // columns
    gradient = gradients[0].unflatten(1, (-1, 2))[:, :, :, row[:, None], column]
    corners = round_half_away(call.rois[:, 1:])  # of pixels, both included
    sizes = (corners[:, 2:] + 1 - corners[:, :2]).clamp(min=0.1 / layer.spatial_scale)
    return gradient.movedim(2, -1) / (layer.trans_std * sizes[:, None, None, None])


def _per_image_pixel(call: Any, gradient: Tensor) -> Tensor:
    """From pixels of the map."""
    return gradient / gradient.new_tensor(call.map_grid.stride)

"""Where deformable convolutions sample: points of one layer, or of several layers in a row.

    with record_sampling(detector) as layers:
        detector.test_step(batch)
    points, weights = trace_points(list(layers.values())[-3:], x=80, y=60)  # 9**3 points

Positions in an image are (x, y) in pixels; pixel i has its centre at i, as in the operators.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmcv.ops import DeformConv2d, ModulatedDeformConv2d
from torch import Tensor, nn

from mmdeform.layers.dcn_base import DCNBase
from mmdeform.layers.sampling import Sampling, deformable_layers, watch_sampling

__all__ = ["LayerSampling", "record_sampling", "trace_points"]

CONVOLUTIONS = (DeformConv2d, ModulatedDeformConv2d, DCNBase)


@dataclass(frozen=True)
class LayerSampling:
    """What one deformable convolution sampled in one forward pass.

    Attributes:
        name: Name of the layer in its model.
        locations: Sampling locations (x, y) in pixels of the image, shape (N, D, K, Ho, Wo, 2) for
            D deform groups and K taps.
        grid: The same without offsets, shape (1, 1, K, Ho, Wo, 2).
        weights: Modulation of each sample, shape (N, D, K, Ho, Wo); ones where the layer has none.
        stride: Distance (x, y) of neighbouring outputs in pixels of the image.
    """

    name: str
    locations: Tensor
    grid: Tensor
    weights: Tensor
    stride: tuple[float, float]


@contextmanager
def record_sampling(model: nn.Module) -> Iterator[dict[str, LayerSampling]]:
    """Records where the deformable convolutions of ``model`` sample while the block runs.

    Args:
        model: A model with deformable convolutions of any version, ours or mmcv's, which is called
            with a batch of images, shape (N, C, H, W), as its first argument or as ``inputs`` (as
            mmdet's detectors call themselves). Locations refer to these images.

    Yields:
        Sampling of each layer by its name, in the order in which the layers ran; of a layer that
        ran more than once the last time.

    Raises:
        ValueError: If the model has no such layer.
    """
    if not any(isinstance(module, CONVOLUTIONS) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no deformable convolution; configure one with, for "
            "example, type='mmdeform.DCNv2'"
        )
    layers = {
        name: layer
        for name, layer in deformable_layers(model).items()
        if isinstance(layer, CONVOLUTIONS)
    }
    record: dict[str, LayerSampling] = {}
    image_size: list[int] = []

    def see_images(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        image_size[:] = (kwargs["inputs"] if "inputs" in kwargs else args[0]).shape[-2:]

    def see_layer(name: str, sampling: Sampling) -> None:
        record.pop(name, None)  # a later run goes to the end
        record[name] = _in_image(name, layers[name], sampling, image_size)

    hooks = [model.register_forward_pre_hook(see_images, with_kwargs=True)]
    hooks += watch_sampling(layers, see_layer)
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


def _in_image(
    name: str, layer: Any, sampling: Sampling, image_size: Sequence[int]
) -> LayerSampling:
    # The layers before have odd kernels and are padded by half of them: pixel i of the map stands
    # over pixel i * scale of the image, without a shift by half a pixel.
    height, width = image_size
    scale = sampling.size.new_tensor([width, height]) / sampling.size
    weights = sampling.mask
    if weights is None:
        weights = torch.ones_like(sampling.locations[..., 0])
    stride = scale * scale.new_tensor(layer.stride).flip(0)
    return LayerSampling(
        name,
        sampling.locations * scale,
        sampling.grid * scale,
        weights,
        (float(stride[0]), float(stride[1])),
    )


def trace_points(
    layers: Sequence[LayerSampling],
    x: float,
    y: float,
    image: int = 0,
    group: int = 0,
    offsets: bool = True,
) -> tuple[Tensor, Tensor]:
    """Follows one output of the last layer through the samples of all layers.

    An output of the last layer reads K points. Each of them is, in the layer before, the output
    nearest to it, which reads K points in turn, and so on: K**k points for k layers, as in figure 5
    of "Deformable Convolutional Networks". Points beyond the border of a map, where there is
    nothing to read, end there.

    Args:
        layers: Recorded layers in the order in which they run.
        x, y: Position in the image, pixels; the nearest output of the last layer is followed.
        image: Index in the batch. Default: 0.
        group: Deform group. Default: 0.
        offsets: Whether to apply the offsets; without them the points are those of plain
            convolutions of the same geometry, and all weights are 1. Default: True.

    Returns:
        The points (x, y) in pixels of the image, shape (P, 2), and their weights, shape (P,): the
        products of the modulations on the way.

    Raises:
        ValueError: If ``layers`` is empty.
    """
    if not layers:
        raise ValueError("layers must name at least one recorded layer, but is empty")
    points = layers[0].locations.new_tensor([[x, y]])
    weights = points.new_ones(1)
    for depth, layer in enumerate(reversed(layers)):
        height, width = layer.locations.shape[3:5]
        column, row = (points / points.new_tensor(layer.stride)).round().long().unbind(1)
        if depth == 0:
            column, row = column.clamp(0, width - 1), row.clamp(0, height - 1)
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        column, row, weights = column[inside], row[inside], weights[inside]
        if offsets:
            locations = layer.locations[image, group]
            factors = layer.weights[image, group][:, row, column]
        else:
            locations = layer.grid[0, 0]
            factors = torch.ones_like(locations[:, row, column, 0])
        points = locations[:, row, column].reshape(-1, 2)
        weights = (factors * weights).reshape(-1)
    return points, weights

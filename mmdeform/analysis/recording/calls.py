"""One forward call of a deformable layer, with everything in pixels of the image."""

import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from mmcv.ops import multi_scale_deform_attn as mmcv_msda
from torch import Tensor, nn

from mmdeform.layers.dat_attn import DeformableAttention2d
from mmdeform.layers.deform_ps_roi_pool import DeformPSRoIPool
from mmdeform.layers.sampling import Sampling
from mmdeform.layers.single_level_deform_attn import SingleLevelDeformableAttention

from .pixel_grid import GridTracer, PixelGrid

__all__ = [
    "KINDS",
    "AttentionCall",
    "ConvolutionCall",
    "KeysCall",
    "LayerCall",
    "RoIPoolingCall",
    "Samples",
    "call_of",
]

# mmcv.ops.deform_roi_pool is the function of this name, which hides its module.
_mmcv_roi = importlib.import_module("mmcv.ops.deform_roi_pool")

KINDS = ("convolution", "roi_pooling", "attention", "keys")  # of layers

# Weights of DAT's attention that are computed at a time: 16 MB of fp32.
MAX_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class Samples:
    """What one output of a layer reads; positions are (x, y) in pixels of the image.

    Attributes:
        points: Where it samples, shape (P, 2).
        regular: Where it would without offsets, shape (P, 2); for attention the reference point.
        weights: How it weighs the samples, shape (P,): masks, attention weights, or ones.
        groups: Deform group, head or class of each sample, int64, shape (P,).
        levels: Feature level of each sample, int64, shape (P,); zeros where there is one.
        center: Position of the output: centre of its window or RoI, reference point, query;
            shape (2,).
    """

    points: Tensor
    regular: Tensor
    weights: Tensor
    groups: Tensor
    levels: Tensor
    center: Tensor


@dataclass(frozen=True)
class LayerCall(ABC):
    """What a deformable layer sampled in one forward call.

    Outputs of a layer are counted by one index: pixels (y * width + x) of a convolution and of
    DAT's attention, queries of multi-scale attention, RoIs of RoI pooling, over all images.

    Attributes:
        kind: Family of the layer: 'convolution', 'roi_pooling', 'attention' (multi-scale
            deformable attention) or 'keys' (DAT).
        name: Name of the layer in its model.
        layer: The layer.
        inputs: Arguments of the call by name.
        sampling: Where it sampled, in pixels of the map it read.
        image_size: (width, height) of the images that the model got, padding included.
        locations: Sampling locations (x, y) in pixels of the image, whose pixel i has its centre
            at i; for their shape see :class:`mmdeform.layers.sampling.Sampling`.
        grid: The same without offsets, of a shape that broadcasts to that of ``locations``.
    """

    kind: ClassVar[str]
    name: str
    layer: nn.Module
    inputs: Mapping[str, Any]
    sampling: Sampling
    image_size: tuple[int, int]
    locations: Tensor
    grid: Tensor

    @property
    def weights(self) -> Tensor | None:
        """Mask or attention weight of each sample, shape of ``locations`` without the last 2."""
        return self.sampling.mask

    @abstractmethod
    def centers(self, image: int = 0) -> Tensor:
        """Positions (x, y) of all outputs in the image, shape (outputs, 2)."""

    @abstractmethod
    def samples(self, output: int, image: int = 0) -> Samples:
        """What one output reads. RoI pooling: RoIs know their image."""

    def nearest(self, x: float, y: float, image: int = 0) -> int:
        """Index of the output nearest to a position in the image; the first of several."""
        centers = self.centers(image)
        distance = (centers - centers.new_tensor([x, y])).square().sum(-1)
        return int(distance.argmin())


@dataclass(frozen=True)
class ConvolutionCall(LayerCall):
    """Of a deformable convolution of any version.

    Attributes:
        map_grid: Pixels of the map that it read.
        output_grid: Pixels of its output.
    """

    kind = "convolution"
    map_grid: PixelGrid
    output_grid: PixelGrid

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of the output."""
        return self.locations.shape[3], self.locations.shape[4]

    def centers(self, image: int = 0) -> Tensor:
        height, width = self.output_size
        y, x = (torch.arange(n, device=self.locations.device) for n in (height, width))
        pixels = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
        return self.output_grid.to_image(pixels.to(self.locations.dtype)).flatten(0, 1)

    def samples(self, output: int, image: int = 0) -> Samples:
        row, column = divmod(output, self.output_size[1])
        locations = self.locations[image, :, :, row, column]  # (D, K, 2)
        regular = self.grid[..., row, column, :].expand(len(self.grid), *locations.shape)[0]
        weights = torch.ones_like(locations[..., 0])
        if self.weights is not None:
            weights = self.weights[image, :, :, row, column]
        return _samples(locations, regular, weights, self.centers()[output])


@dataclass(frozen=True)
class RoIPoolingCall(LayerCall):
    """Of deformable RoI pooling: samples are the means of bins.

    Attributes:
        rois: Index of the image and box (x1, y1, x2, y2) of each RoI in pixels of the image, where
            pixel i reaches from i to i + 1, shape (R, 5).
    """

    kind = "roi_pooling"
    rois: Tensor

    @property
    def bin_sizes(self) -> Tensor:
        """(width, height) of the bins of each RoI in pixels of the image, shape (R, 2)."""
        rows, columns = self.layer.output_size
        sizes = self.rois[:, 3:] - self.rois[:, 1:3]
        return sizes / sizes.new_tensor([columns, rows])

    def centers(self, image: int = 0) -> Tensor:
        """Centres (x, y) of all RoIs; those of other images are NaN."""
        centers = (self.rois[:, 1:3] + self.rois[:, 3:]) / 2 - 0.5
        return centers.masked_fill((self.rois[:, 0] != image)[:, None], float("nan"))

    def nearest(self, x: float, y: float, image: int = 0) -> int:
        centers = self.centers(image)
        distance = (centers - centers.new_tensor([x, y])).square().sum(-1)
        if distance.isnan().all():
            raise ValueError(f"{self.name} pooled no RoI of image {image} in this call")
        return int(distance.nan_to_num(nan=float("inf")).argmin())

    def samples(self, output: int, image: int = 0) -> Samples:
        locations = self.locations[output]  # (..., Ph, Pw, 2)
        locations = locations.reshape(-1, *locations.shape[-3:-1], 2).flatten(1, 2)
        regular = self.grid.expand(self.locations.shape)[output].reshape(locations.shape)
        weights = torch.ones_like(locations[..., 0])
        if self.weights is not None:
            weights = self.weights[output].reshape(weights.shape)
        center = (self.rois[output, 1:3] + self.rois[output, 3:]) / 2 - 0.5
        return _samples(locations, regular, weights, center)


@dataclass(frozen=True)
class AttentionCall(LayerCall):
    """Of multi-scale deformable attention, or of its variant in which levels are not mixed.

    Attributes:
        level_sizes: (width, height) of each feature level.
    """

    kind = "attention"
    level_sizes: tuple[tuple[int, int], ...]

    @property
    def is_encoder(self) -> bool:
        """Whether the queries are the pixels of all levels, one level after the other."""
        return self.locations.shape[1] == sum(width * height for width, height in self.level_sizes)

    def level_of(self, query: int) -> int:
        """The level whose pixel a query of an encoder is."""
        if not self.is_encoder:
            raise ValueError(f"the queries of {self.name} are not pixels, so they have no level")
        end = 0
        for level, (width, height) in enumerate(self.level_sizes):
            end += width * height
            if query < end:
                return level
        raise IndexError(f"query must be less than {end}, got {query}")

    def centers(self, image: int = 0) -> Tensor:
        """Reference points (x, y), the centres of reference boxes, shape (queries, 2)."""
        grid = self.grid.expand(self.locations.shape)
        return grid[image, :, 0, 0, 0]

    def samples(self, output: int, image: int = 0) -> Samples:
        locations = self.locations[image, output]  # (M, L, P, 2)
        heads, levels, points = locations.shape[:3]
        regular = self.grid.expand(self.locations.shape)[image, output]
        level = torch.arange(levels, device=locations.device)
        if isinstance(self.layer, SingleLevelDeformableAttention):
            level = level + self.level_of(output)
        return _samples(
            locations.flatten(1, 2),
            regular.flatten(1, 2),
            self.weights[image, output].flatten(1, 2),
            self.centers(image)[output],
            level.repeat_interleave(points).expand(heads, -1),
        )


@dataclass(frozen=True)
class KeysCall(LayerCall):
    """Of deformable attention of DAT: all queries, the pixels of the map, share the keys.

    Attributes:
        map_grid: Pixels of the map: queries.
    """

    kind = "keys"
    map_grid: PixelGrid

    @property
    def map_size(self) -> tuple[int, int]:
        """(height, width) of the map."""
        return self.inputs["x"].shape[2], self.inputs["x"].shape[3]

    def centers(self, image: int = 0) -> Tensor:
        height, width = self.map_size
        y, x = (torch.arange(n, device=self.locations.device) for n in (height, width))
        pixels = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
        return self.map_grid.to_image(pixels.to(self.locations.dtype)).flatten(0, 1)

    @torch.no_grad()
    def attention(self, queries: Tensor, image: int = 0) -> Tensor:
        """Attention of some queries, averaged over them.

        Args:
            queries: Pixels of the map, y * width + x, int64, shape (K,); many are computed in
                chunks of bounded size.
            image: Index in the batch. Default: 0.

        Returns:
            Weights of the keys for each head, shape (M, Ns), which sum to 1 over the keys. Head m
            belongs to group ``m // (M // G)``.

        Raises:
            ValueError: ``queries`` is empty.
        """
        if not len(queries):
            raise ValueError("queries must hold at least one index, but is empty")
        heads, count = self.layer.num_heads, self.locations.shape[2:4].numel()
        total = self.locations.new_zeros(heads, count)
        for chunk in queries.split(max(1, MAX_WEIGHTS // (heads * count))):
            weights = self.layer.attention(self.inputs["x"][image : image + 1], chunk)
            total += weights[0].to(total.dtype).sum(1)
        return total / len(queries)

    def samples(self, output: int, image: int = 0) -> Samples:
        """Keys of all groups, weighed by a query's attention: the mean of a group's heads."""
        locations = self.locations[image].flatten(1, 2)  # (G, Ns, 2)
        regular = self.grid.expand(self.locations.shape)[image].flatten(1, 2)
        queries = torch.tensor([output], device=locations.device)
        weights = self.attention(queries, image).unflatten(0, (len(locations), -1)).mean(1)
        return _samples(locations, regular, weights, self.centers()[output])


def _samples(
    locations: Tensor,
    regular: Tensor,
    weights: Tensor,
    center: Tensor,
    levels: Tensor | None = None,
) -> Samples:
    """From tensors of shape (groups, points[, 2])."""
    groups = torch.arange(len(locations), device=locations.device)[:, None].expand(weights.shape)
    if levels is None:
        levels = torch.zeros_like(groups)
    return Samples(
        points=locations.flatten(0, 1),
        regular=regular.flatten(0, 1),
        weights=weights.flatten(),
        groups=groups.flatten(),
        levels=levels.flatten(),
        center=center,
    )


@functools.singledispatch
def call_of(
    layer: nn.Module, name: str, inputs: Mapping[str, Any], sampling: Sampling, tracer: GridTracer
) -> LayerCall:
    """The call of a layer in pixels of the image; of deformable convolutions unless registered.

    Args:
        layer: A deformable layer.
        name: Its name in its model.
        inputs: Arguments of the call by name.
        sampling: Where it sampled.
        tracer: What watched the forward pass.
    """
    map_grid = tracer.grid_of(_pixels(sampling.size))
    sides = [tuple(reversed(getattr(layer, side))) for side in ("kernel_size", "stride", "padding")]
    return ConvolutionCall(
        name, layer, inputs, sampling, tracer.image_size,
        locations=map_grid.to_image(sampling.locations),
        grid=map_grid.to_image(sampling.grid),
        map_grid=map_grid,
        output_grid=map_grid.of_windows(*sides, tuple(reversed(layer.dilation))),
    )  # fmt: skip


@call_of.register(_mmcv_roi.DeformRoIPool)
@call_of.register(DeformPSRoIPool)
def _roi_pooling(layer: Any, name: str, inputs: Any, sampling: Sampling, tracer: Any) -> LayerCall:
    stride = 1 / layer.spatial_scale
    grid = PixelGrid((stride, stride), ((stride - 1) / 2, (stride - 1) / 2))
    return RoIPoolingCall(
        name, layer, inputs, sampling, tracer.image_size,
        locations=grid.to_image(sampling.locations),
        grid=grid.to_image(sampling.grid),
        rois=inputs["rois"].detach(),
    )  # fmt: skip


@call_of.register(mmcv_msda.MultiScaleDeformableAttention)
def _attention(layer: Any, name: str, inputs: Any, sampling: Sampling, tracer: Any) -> LayerCall:
    width, height = tracer.image_size
    scale = sampling.size.new_tensor([width, height]) / sampling.size

    def in_image(points: Tensor) -> Tensor:
        return (points + 0.5) * scale - 0.5

    return AttentionCall(
        name, layer, inputs, sampling, tracer.image_size,
        locations=in_image(sampling.locations),
        grid=in_image(sampling.grid),
        level_sizes=tuple((w, h) for h, w in inputs["spatial_shapes"].tolist()),
    )  # fmt: skip


@call_of.register(DeformableAttention2d)
def _keys(layer: Any, name: str, inputs: Any, sampling: Sampling, tracer: Any) -> LayerCall:
    map_grid = tracer.grid_of(_pixels(sampling.size))
    return KeysCall(
        name, layer, inputs, sampling, tracer.image_size,
        locations=map_grid.to_image(sampling.locations),
        grid=map_grid.to_image(sampling.grid),
        map_grid=map_grid,
    )  # fmt: skip


def _pixels(size: Tensor) -> tuple[int, int]:
    return int(size[0]), int(size[1])

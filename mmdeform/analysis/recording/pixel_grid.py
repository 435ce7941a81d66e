"""Where the pixels of a feature map lie in the image it was computed from."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mmdeform.layers.sampling import is_deformable

__all__ = ["GridTracer", "PixelGrid", "normalized_grid"]

Size = tuple[int, int]  # (width, height)


@dataclass(frozen=True)
class PixelGrid:
    """Centres of the pixels of a feature map: pixel (i, j) lies at ``first + stride * (i, j)``.

    Positions are (x, y) in pixels of the image, whose pixel i has its centre at i.

    Attributes:
        stride: Distance (x, y) of neighbouring pixels.
        first: Centre (x, y) of the first pixel.
    """

    stride: tuple[float, float] = (1.0, 1.0)
    first: tuple[float, float] = (0.0, 0.0)

    def to_image(self, points: Tensor) -> Tensor:
        """Positions in the image of points (x, y) in pixels of the map, shape (..., 2)."""
        return points * points.new_tensor(self.stride) + points.new_tensor(self.first)

    def to_map(self, points: Tensor) -> Tensor:
        """Points (x, y) in pixels of the map at positions in the image, shape (..., 2)."""
        return (points - points.new_tensor(self.first)) / points.new_tensor(self.stride)

    def of_windows(
        self, kernel: Size, stride: Size, padding: Size, dilation: Size = (1, 1)
    ) -> "PixelGrid":
        """The grid of the outputs of a layer that moves a window, all (x, y), over this map.

        An output lies at the centre of its window: odd kernels padded by half of them put it on a
        pixel, patches of 2x2 or 4x4 pixels between pixels.
        """
        middle = (d * (k - 1) / 2 - p for k, p, d in zip(kernel, padding, dilation, strict=True))
        return PixelGrid(
            (self.stride[0] * stride[0], self.stride[1] * stride[1]),
            tuple(f + s * m for f, s, m in zip(self.first, self.stride, middle, strict=True)),
        )


def normalized_grid(map_size: Size, image_size: Size) -> PixelGrid:
    """The grid of a map that covers the image exactly, edge to edge; sizes are (width, height).

    That is how positions relate where a network counts in shares of width and height, as detection
    transformers do, or in boxes, as RoI pooling does.
    """
    x, y = (image / map for image, map in zip(image_size, map_size, strict=True))
    return PixelGrid((x, y), ((x - 1) / 2, (y - 1) / 2))


class GridTracer:
    """Finds the grid of a feature map by the layers that ran before it.

    The layers on the way to a map are found by the sizes of their inputs and outputs, from the size
    of the image down: convolutions, deformable ones included, pooling and ``nn.Unfold``. Of
    different ways the longest counts, which is the backbone's where an attention downsamples its
    keys at once; of layers that lead from one size to the same other one, such as a convolution and
    its shortcut, the first. What a deformable layer has inside is not on the way to anything.

    A map that was padded to the right and below, by less than a stride, is recognised: patches are
    made of odd maps like this. A map whose size is not reached, because something was sliced or
    cropped, is taken to cover the image edge to edge: see :func:`normalized_grid`.

    Attributes:
        image_size: (width, height) of the images of the last forward pass; None before it.
        images: How many they were.
    """

    def __init__(self) -> None:
        self.image_size: Size | None = None
        self.images = 0
        self._steps: dict[Size, dict[Size, _Window]] = {}

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Watches a model, which is called with images as first argument or as ``inputs``."""
        handles = [model.register_forward_pre_hook(self._see_images, with_kwargs=True)]
        handles += [
            layer.register_forward_hook(self._see_layer, with_kwargs=True)
            for layer in _windowed_layers(model)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def grid_of(self, map_size: Size) -> PixelGrid:
        """The grid of a map of the last forward pass by its (width, height)."""
        if self.image_size is None:
            raise RuntimeError("no images were seen: call the model while it is watched")
        depth, grids = {self.image_size: 0}, {self.image_size: PixelGrid()}
        for before in sorted(self._steps, key=lambda size: -size[0] * size[1]):
            for after, window in self._steps[before].items():
                source = _unpadded(before, grids, stride=window[1])
                if source is not None and depth[source] + 1 > depth.get(after, 0):
                    depth[after] = depth[source] + 1
                    grids[after] = grids[source].of_windows(*window)
        return grids.get(map_size) or normalized_grid(map_size, self.image_size)

    def _see_images(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        images = kwargs["inputs"] if "inputs" in kwargs else args[0]
        if not isinstance(images, Tensor) or images.dim() != 4:
            raise TypeError(
                f"{type(model).__name__} must be called with a batch of images, a tensor of shape "
                f"(N, C, H, W), got {type(images).__name__}"
            )
        self.image_size = (images.shape[3], images.shape[2])
        self.images = len(images)
        self._steps.clear()

    def _see_layer(
        self, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor
    ) -> None:
        map = args[0] if args else next(iter(kwargs.values()))
        if map.dim() != 4:  # an image without a batch
            return
        window = _window(layer)
        before = _size(layer, map)
        if isinstance(layer, nn.Unfold):  # its output is flat
            after = tuple(
                (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
                for size, kernel, stride, padding, dilation in zip(before, *window, strict=True)
            )
        else:
            after = _size(layer, output)
        if after[0] * after[1] < before[0] * before[1]:
            self._steps.setdefault(before, {}).setdefault(after, window)


_Window = tuple[Size, Size, Size, Size]  # kernel, stride, padding, dilation; each (x, y)
_WINDOWED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.Unfold)


def _unpadded(size: Size, known: Iterable[Size], stride: Size) -> Size | None:
    """The known map of this size, or the largest that is smaller by less than a stride."""
    candidates = [
        other
        for other in known
        if all(0 <= side - o < step for side, o, step in zip(size, other, stride, strict=True))
    ]
    return max(candidates, key=sum, default=None)


def _windowed_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Layers whose windows make a map of another size; none that is part of a deformable layer."""
    deformable = is_deformable(model)
    windowed = isinstance(model, _WINDOWED) or (deformable and hasattr(model, "dilation"))
    if windowed and not isinstance(model.padding, str) and _changes_size(model):
        yield model
    if not deformable:
        for child in model.children():
            yield from _windowed_layers(child)


def _changes_size(layer: nn.Module) -> bool:
    return any(
        stride > 1 or 2 * padding != dilation * (kernel - 1)
        for kernel, stride, padding, dilation in zip(*_window(layer), strict=True)
    )


def _window(layer: nn.Module) -> _Window:
    sides = []
    for name in ("kernel_size", "stride", "padding", "dilation"):
        value: Any = getattr(layer, name, 1)  # AvgPool2d has no dilation
        vertical, horizontal = (value, value) if isinstance(value, int) else value
        sides.append((int(horizontal), int(vertical)))
    return tuple(sides)


def _size(layer: nn.Module, map: Tensor) -> Size:
    dims = (2, 1) if getattr(layer, "channels_last", False) else (3, 2)
    return (map.shape[dims[0]], map.shape[dims[1]])

"""Measures the deformable convolutions of a detector on one image after the other."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmcv.ops import DeformConv2d, ModulatedDeformConv2d
from torch import nn

from mmdeform.layers.dcn_base import DCNBase
from mmdeform.layers.sampling import deformable_layers

from ..detectors import Picture, load_picture
from ..recording import ConvolutionCall, record
from .filters import adjacent_taps, effective_dilation
from .objects import CLASSES, LEFT_OUT, object_classes, size_classes
from .spread import LayerDilation

__all__ = ["EffectiveDilation"]

CONVOLUTIONS = (DeformConv2d, ModulatedDeformConv2d, DCNBase)


class EffectiveDilation:
    """Effective dilation of the deformable convolutions of a detector.

    Filters whose centre is not in the image, but in its padding, are left out, and so are layers of
    1x1 kernels, which have no adjacent samples.

    Args:
        model: What :func:`~mmdeform.analysis.detectors.load_detector` returns.
        layers: Which layers, a pattern or several; see
            :func:`mmdeform.layers.sampling.deformable_layers`. Default: all.
        sizes: Limits of small and large objects in pixels of the original image; see
            :func:`~mmdeform.analysis.dilation.size_classes`. Default: (32, 96).

    Attributes:
        names: Names of the measured layers.
        objects: How many objects of each size there were so far, ignored ones not counted.

    Raises:
        ValueError: There is no such layer, or the sizes are not positive and increasing.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[str] = "**",
        sizes: tuple[float, float] = (32, 96),
    ) -> None:
        if not 0 < sizes[0] < sizes[1]:
            raise ValueError(f"sizes must be positive and increase, got {sizes[0]} {sizes[1]}")
        found = deformable_layers(model, layers)
        self.names = [
            name
            for name, layer in found.items()
            if isinstance(layer, CONVOLUTIONS) and tuple(layer.kernel_size) != (1, 1)
        ]
        if not self.names:
            kinds = ", ".join(sorted({type(layer).__name__ for layer in found.values()}))
            raise ValueError(
                "layers must match a deformable convolution with a kernel larger than 1x1, got "
                f"{layers!r}, which matches {kinds} alone"
            )
        self.model, self.sizes = model, sizes
        self.objects = dict.fromkeys(CLASSES[:-1], 0)
        self._rows: dict[tuple[str, int], LayerDilation] = {}

    def add_image(self, info: Mapping[str, Any]) -> None:
        """Runs the detector on an image and adds its filters.

        Args:
            info: The image as ``get_data_info`` of mmdet's data sets tells it: ``img_path`` and
                ``instances``, each with ``bbox`` (x1, y1, x2, y2) in pixels of the image and
                maybe ``ignore_flag``, 1 for crowds and the like.

        Raises:
            ValueError: The model is in training mode, the image cannot be read, offsets are not
                finite, or a layer reads maps of RoIs.
        """
        if self.model.training:
            raise ValueError("model must be in evaluation mode: call model.eval() first")
        picture = load_picture(self.model, info["img_path"])
        instances = info["instances"]
        boxes = np.array([instance["bbox"] for instance in instances], float).reshape(-1, 4)
        ignored = np.array([instance.get("ignore_flag", 0) for instance in instances], bool)
        with torch.no_grad(), record(self.model, self.names) as recording:
            self.model.test_step(picture.batch)
        if recording.without_place:
            raise ValueError(
                f"layers: {recording.without_place[0]} reads maps of RoIs, whose pixels have no "
                "place in the image; leave it out"
            )
        for name in recording.names:
            for number, call in enumerate(recording.calls(name)):
                self._add_call(call, number, picture, boxes, ignored)
        for index in size_classes(boxes[~ignored], self.sizes):
            self.objects[CLASSES[index]] += 1

    def rows(self) -> list[LayerDilation]:
        """What was measured so far, for each call of a layer, in the order of the model."""
        order = {name: index for index, name in enumerate(self.names)}
        return sorted(self._rows.values(), key=lambda row: (order[row.layer], row.call))

    def _add_call(
        self,
        call: ConvolutionCall,
        number: int,
        picture: Picture,
        boxes: np.ndarray,
        ignored: np.ndarray,
    ) -> None:
        locations, grid = call.sampling.locations, call.sampling.grid
        pairs = adjacent_taps(grid[0, 0, :, 0, 0])
        stride = np.divide(call.map_grid.stride, picture.scale)
        in_map, in_image = (
            effective_dilation(locations, pairs, scale)[0].flatten(1).cpu().numpy()
            for scale in ((1.0, 1.0), stride.tolist())
        )
        if not np.isfinite(in_map).all():
            raise ValueError(f"the offsets of {call.name} are not finite on {picture.path}")
        centers = picture.from_inputs(call.centers())
        inside = (centers >= -0.5) & (centers < np.subtract(picture.size, 0.5))
        classes = object_classes(centers, boxes, ignored, self.sizes)
        classes[~inside.all(-1)] = LEFT_OUT
        key = (call.name, number)
        if key not in self._rows:
            regular = effective_dilation(grid[:, :, :, :1, :1], pairs)
            self._rows[key] = LayerDilation(*key, float(regular.mean()))
        self._rows[key].add(in_map, in_image, classes, stride)

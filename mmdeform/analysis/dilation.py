"""Effective dilation of deformable convolutions, by the size of the object that a filter looks at.

Source: Dai et al., "Deformable Convolutional Networks" (2017), https://arxiv.org/abs/1703.06211,
table 2: the mean distance of all adjacent pairs of a filter's sampling locations, for filters whose
centres lie on small, medium and large objects and on the background.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmdeform.layers.dat_attn import DeformableAttention2d
from mmdeform.layers.sampling import deformable_layers

from .detectors import load_picture
from .recording import ConvolutionCall, record

__all__ = [
    "CLASSES",
    "COCO_SIZES",
    "LayerDilation",
    "adjacent_taps",
    "classify_filters",
    "effective_dilation",
    "measure_dilation",
]

CLASSES = ("small", "medium", "large", "background")
COCO_SIZES = (32.0, 96.0)  # square roots of the areas between small, medium and large
LEFT_OUT = -1


def adjacent_taps(grid: Tensor) -> Tensor:
    """Pairs of taps that are neighbours in a row or column of the kernel.

    Args:
        grid: Locations of the taps of one filter without offsets, in any order, shape (K, 2).

    Returns:
        Indices of both taps, shape (pairs, 2): 12 pairs for 3x3. Taps on both sides of a centre
        that is missing (``remove_center``) are no neighbours.
    """
    # Place of each tap in the kernel; values of a column differ by rounding at most.
    places = [
        ((axis[:, None] - axis).abs() < 1e-3).int().argmax(1).unique(return_inverse=True)
        for axis in grid.unbind(1)
    ]
    ranks = [
        grid[first, axis].argsort().argsort()[inverse]
        for axis, (first, inverse) in enumerate(places)
    ]
    columns, rows = ranks
    step = (columns[:, None] - columns).abs() + (rows[:, None] - rows).abs()
    return (step == 1).triu().nonzero()


def effective_dilation(locations: Tensor, pairs: Tensor) -> Tensor:
    """Mean distance of adjacent sampling locations of each filter.

    Args:
        locations: Sampling locations, shape (N, D, K, Ho, Wo, 2).
        pairs: Which taps are adjacent; see :func:`adjacent_taps`.

    Returns:
        Shape (N, D, Ho, Wo), fp64, in the unit of ``locations``. Without offsets it is exactly the
        dilation; of a kernel whose dilations differ, their mean over the pairs.
    """
    first, second = locations[:, :, pairs[:, 0]], locations[:, :, pairs[:, 1]]
    return (first.double() - second.double()).norm(dim=-1).mean(2)


def classify_filters(
    centers: np.ndarray,
    boxes: np.ndarray,
    sizes: Sequence[float] = COCO_SIZES,
    ignored: np.ndarray | None = None,
) -> np.ndarray:
    """On what kind of object the centres of filters lie.

    Args:
        centers: (x, y) in pixels of the image, whose pixel i has its centre at i, shape (F, 2).
        boxes: Annotated boxes (x1, y1, x2, y2), edges in pixels, shape (B, 4). A centre in several
            boxes belongs to the smallest.
        sizes: Square roots of the box areas from which on objects are medium and large.
            Default: those of COCO.
        ignored: Boxes of crowds, shape (C, 4). Centres in them, and in no other box, are left out.

    Returns:
        Index in :data:`CLASSES` of each centre, or -1 for those left out, shape (F,).
    """
    boxes = np.asarray(boxes, float).reshape(-1, 4)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kinds = np.digitize(np.sqrt(areas), sizes)  # 0, 1, 2
    result = np.full(len(centers), CLASSES.index("background"))
    if ignored is not None and len(ignored):
        result[_inside(centers, np.asarray(ignored, float).reshape(-1, 4)).any(1)] = LEFT_OUT
    inside = _inside(centers, boxes)
    for box in np.argsort(-areas, kind="stable"):  # the smallest comes last
        result[inside[:, box]] = kinds[box]
    return result


def _inside(centers: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    points = centers[:, None] + 0.5
    return ((points >= boxes[:, :2]) & (points < boxes[:, 2:])).all(-1)


@dataclass
class LayerDilation:
    """Effective dilations of one layer, summed up filter by filter.

    Each deform group has filters of its own. Attributes have the shape (D, classes).

    Attributes:
        name: Name of the layer in its model.
        regular: Effective dilation without offsets.
        stride: Pixels of the image per pixel of the sampled map, mean of x and y.
        count: Filters.
        total: Sums of their effective dilations, in pixels of the sampled map.
        squares: Sums of the squares.
    """

    name: str
    regular: float
    stride: float
    count: np.ndarray = field(repr=False)
    total: np.ndarray = field(repr=False)
    squares: np.ndarray = field(repr=False)

    def add(self, dilations: np.ndarray, classes: np.ndarray) -> None:
        """Adds the filters of an image: dilations (D, F) and classes (F,)."""
        for index in range(len(CLASSES)):
            chosen = dilations[:, classes == index]
            self.count[:, index] += chosen.shape[1]
            self.total[:, index] += chosen.sum(1)
            self.squares[:, index] += np.square(chosen).sum(1)

    def mean(self, group: int | None = None) -> np.ndarray:
        """Mean for each class, NaN without filters; of one deform group or of all."""
        return self._mean_and_variance(group)[0]

    def std(self, group: int | None = None) -> np.ndarray:
        """Standard deviation over filters for each class; of one deform group or of all."""
        return np.sqrt(self._mean_and_variance(group)[1])

    def _mean_and_variance(self, group: int | None) -> tuple[np.ndarray, np.ndarray]:
        groups = slice(None) if group is None else slice(group, group + 1)
        count, total, squares = (
            sums[groups].sum(0) for sums in (self.count, self.total, self.squares)
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = total / count
            return mean, np.maximum(squares / count - mean**2, 0)


def measure_dilation(
    model: nn.Module,
    dataset: Any,
    images: int | None = None,
    layers: str | Sequence[str] = "**",
    sizes: Sequence[float] = COCO_SIZES,
) -> Iterator[tuple[int, dict[str, LayerDilation]]]:
    """Measures the effective dilation of a detector's deformable convolutions over a data set.

    Args:
        model: Detector, from :func:`mmdeform.analysis.detectors.load_detector`.
        dataset: Data set of mmdet, from :func:`mmdeform.analysis.detectors.build_dataset`.
        images: How many images, from the first on. Default: None, all.
        layers: A pattern or several, of which a layer's name has to match one. Passed over are
            layers that are no convolutions, kernels of 1x1, which have no adjacent samples, and
            calls on several maps for one image: those are of RoIs. Default: all.
        sizes: See :func:`classify_filters`; in pixels of the images as they are in their files.

    Yields:
        After each image how many have been seen, and the layers by name; the same, growing dict.
        Filters whose centre lies in the padding are left out.

    Raises:
        ValueError: The model has no deformable convolution among the layers, or the data set no
            image, or offsets are not finite.
    """
    if not len(sizes) == 2 or not 0 < sizes[0] < sizes[1]:
        raise ValueError(f"sizes must be two numbers, 0 < medium < large, got {tuple(sizes)}")
    count = len(dataset) if images is None else min(images, len(dataset))
    if count < 1:
        raise ValueError(f"there must be at least one image, got {count}")
    names = [
        name
        for name, layer in deformable_layers(model, layers).items()
        if max(getattr(layer, "kernel_size", (1,))) > 1
        and not isinstance(layer, DeformableAttention2d)
    ]
    if not names:
        raise ValueError(
            f"layers: {layers!r} matches no deformable convolution with a kernel larger than 1x1"
        )
    found: dict[str, LayerDilation] = {}
    for index in range(count):
        info = dataset.get_data_info(index)
        picture = load_picture(model, info["img_path"])
        with torch.no_grad(), record(model, names) as recording:
            model.test_step(picture.batch)
        boxes = {True: [], False: []}
        for instance in info["instances"]:
            boxes[bool(instance["ignore_flag"])].append(instance["bbox"])
        for call in recording:
            if len(call.locations) != 1:
                continue
            centers = picture.from_inputs(call.centers())
            classes = classify_filters(centers, boxes[False], sizes, boxes[True])
            classes[~_inside(centers, np.array([[0.0, 0.0, *picture.size]]))[:, 0]] = LEFT_OUT
            _add_call(found, call, classes)
        yield index + 1, found


def _add_call(found: dict[str, LayerDilation], call: ConvolutionCall, classes: np.ndarray) -> None:
    grid = call.sampling.grid
    pairs = adjacent_taps(grid[0, 0, :, 0, 0])
    if call.name not in found:
        sums = [np.zeros((call.locations.shape[1], len(CLASSES))) for _ in range(3)]
        regular = float(effective_dilation(grid[:, :, :, :1, :1], pairs))
        found[call.name] = LayerDilation(call.name, regular, sum(call.map_grid.stride) / 2, *sums)
    dilations = effective_dilation(call.sampling.locations, pairs)[0].flatten(1)
    if not dilations.isfinite().all():
        raise ValueError(f"the offsets of {call.name} are NaN or infinite")
    found[call.name].add(dilations.cpu().numpy(), classes)

"""Mean and standard deviation of effective dilation, image by image."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .objects import CLASSES

__all__ = ["LayerDilation", "Spread"]


@dataclass
class Spread:
    """Mean and standard deviation of numbers that arrive in portions, in fp64.

    Attributes:
        count: How many there were.
        mean: Their mean; 0 before the first.
        squares: Sum of the squares of their differences from the mean.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """Standard deviation of these numbers, not an estimate for others; 0 before the first."""
        return (self.squares / max(self.count, 1)) ** 0.5

    def add(self, values: np.ndarray) -> None:
        """Adds numbers, shape (P,), which may be none."""
        if not len(values):
            return
        mean = float(values.mean(dtype=float))
        step, total = mean - self.mean, self.count + len(values)
        self.squares += float(np.square(values - mean).sum())
        self.squares += step**2 * self.count * len(values) / total
        self.mean += step * len(values) / total
        self.count = total


def _spreads() -> dict[str, Spread]:
    return {name: Spread() for name in CLASSES}


@dataclass
class LayerDilation:
    """Effective dilation of the filters of a layer, the mean over their deform groups.

    A layer that runs several times for an image, such as that of a head for all levels, has one of
    these for each of its calls.

    Attributes:
        layer: Name of the layer.
        call: Which of its calls for an image, from 0.
        regular: What the effective dilation would be without offsets, in pixels of the sampled map.
        stride: Distance (x, y) of neighbouring pixels of the sampled map in pixels of the original
            image, the mean over images.
        classes: Effective dilation by class of object in pixels of the sampled map.
        in_image: The same in pixels of the original image.
        groups: As ``classes``, for each deform group.
        images: How many images were added.
    """

    layer: str
    call: int
    regular: float
    stride: tuple[float, float] = (0.0, 0.0)
    classes: dict[str, Spread] = field(default_factory=_spreads)
    in_image: dict[str, Spread] = field(default_factory=_spreads)
    groups: list[dict[str, Spread]] = field(default_factory=list)
    images: int = 0

    def add(
        self,
        in_map: np.ndarray,
        in_image: np.ndarray,
        classes: np.ndarray,
        stride: Sequence[float],
    ) -> None:
        """Adds the filters of an image.

        Args:
            in_map: Effective dilation in pixels of the sampled map, shape (D, P).
            in_image: The same in pixels of the original image, shape (D, P).
            classes: Index into ``CLASSES`` of each filter, or -1 to leave it out, shape (P,).
            stride: Of this image, as the attribute.
        """
        self.images += 1
        mean, new = np.asarray(self.stride), np.asarray(stride)
        self.stride = tuple((mean + (new - mean) / self.images).tolist())
        self.groups = self.groups or [_spreads() for _ in in_map]
        for index, name in enumerate(CLASSES):
            chosen = classes == index
            self.classes[name].add(in_map.mean(0)[chosen])
            self.in_image[name].add(in_image.mean(0)[chosen])
            for spreads, values in zip(self.groups, in_map, strict=True):
                spreads[name].add(values[chosen])

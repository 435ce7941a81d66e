"""On which object a position of the image lies, and how large that is."""

from collections.abc import Sequence

import numpy as np

__all__ = ["CLASSES", "object_classes", "size_classes"]

CLASSES = ("small", "medium", "large", "background")
BACKGROUND, LEFT_OUT = CLASSES.index("background"), -1


def size_classes(boxes: np.ndarray, sizes: Sequence[float] = (32, 96)) -> np.ndarray:
    """Whether objects are small, medium or large.

    Args:
        boxes: Boxes (x1, y1, x2, y2) in pixels, shape (B, 4).
        sizes: An object is small if the area of its box is less than the square of the first, and
            large from the square of the second. Default: (32, 96), the limits of COCO.

    Returns:
        Indices into ``CLASSES``, int64, shape (B,).
    """
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1)
    return np.searchsorted(np.square(sizes), areas, side="right")


def object_classes(
    points: np.ndarray,
    boxes: np.ndarray,
    ignored: np.ndarray | None = None,
    sizes: Sequence[float] = (32, 96),
) -> np.ndarray:
    """Classes of positions by the objects on which they lie.

    A position belongs to the smallest of the boxes around it. The left and upper edge of a box
    belong to it, the right and lower one do not.

    Args:
        points: Positions (x, y) in pixels of the image, whose pixel i has its centre at i, shape
            (P, 2).
        boxes: Boxes (x1, y1, x2, y2), in which pixel i reaches from i to i + 1, shape (B, 4).
        ignored: Whether a box marks a crowd or the like instead of one object, bool, shape (B,): a
            position in such boxes alone is neither on an object nor on the background. Default:
            None, no such boxes.
        sizes: See :func:`size_classes`.

    Returns:
        Indices into ``CLASSES``, or -1 for what is to be left out, int64, shape (P,).
    """
    points = points + 0.5  # as boxes count
    ignored = np.zeros(len(boxes), bool) if ignored is None else ignored
    classes = np.where(ignored, LEFT_OUT, size_classes(boxes, sizes))
    result = np.full(len(points), BACKGROUND)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1)
    for index in np.lexsort((-areas, ~ignored)):  # objects over what is ignored, small over large
        inside = (points >= boxes[index, :2]) & (points < boxes[index, 2:])
        result[inside.all(-1)] = classes[index]
    return result

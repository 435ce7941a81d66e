"""The sampling rule shared by every operator, in PyTorch."""

from collections.abc import Iterator

import torch
from torch import Tensor


def bilinear_corners(
    y: Tensor, x: Tensor, height: int, width: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Splits sampling positions into the four pixels around them.

    A position contributes if and only if ``-1 < y < height`` and ``-1 < x < width``; a corner
    outside the image counts as zero, and so do NaN and infinite positions, which also get a zero
    gradient. At integer positions the gradient is the right-sided one.

    Args:
        y: Row coordinates in pixels, any shape.
        x: Column coordinates in pixels, same shape.
        height: Rows of the image.
        width: Columns of the image.

    Yields:
        Four times ``(index, weight)`` of the shape of ``y``: the flat pixel index (int64) and the
        bilinear weight. Where the corner does not count the weight is zero and the index
        ``height * width``: one pixel of zeros behind the image keeps out values that are not
        finite (see :func:`with_zero_pixel`).
    """
    inside = (y > -1) & (y < height) & (x > -1) & (x < width)
    y = y.where(inside, 0)
    x = x.where(inside, 0)
    top, left = y.detach().floor(), x.detach().floor()
    for row, row_weight in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, column_weight in ((left, 1 - (x - left)), (left + 1, x - left)):
            valid = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = (row.long() * width + column.long()).where(valid, height * width)
            yield index, (row_weight * column_weight).where(valid, 0)


def with_zero_pixel(pixels: Tensor, dim: int) -> Tensor:
    """Appends the pixel of zeros that :func:`bilinear_corners` points at, along axis ``dim``."""
    return torch.cat([pixels, torch.zeros_like(pixels.narrow(dim, 0, 1))], dim)

"""The sampling rule shared by every operator, in PyTorch."""

from collections.abc import Iterator

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
        Four times ``(index, weight)`` of the shape of ``y``: the flat pixel index (int64, always
        inside the image) and the bilinear weight, zero where the corner does not count.
    """
    inside = (y > -1) & (y < height) & (x > -1) & (x < width)
    y = y.where(inside, 0)
    x = x.where(inside, 0)
    top, left = y.detach().floor(), x.detach().floor()
    for row, row_weight in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, column_weight in ((left, 1 - (x - left)), (left + 1, x - left)):
            valid = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            yield index.long(), (row_weight * column_weight).where(valid, 0)

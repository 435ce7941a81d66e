"""What the operators that pool regions of interest share, in PyTorch."""

import functools
from collections.abc import Callable, Sequence

from torch import Tensor

from ._bilinear import with_zero_pixel


def image_indices(rois: Tensor, images: int) -> list[int]:
    """The image of each RoI (R, 5).

    Raises:
        ValueError: An index lies outside [0, images) or is not finite.
    """
    indices = rois[:, 0].tolist()
    for roi, index in enumerate(indices):
        if not 0 <= index < images:
            raise ValueError(
                f"rois: expected image indices in [0, {images}), got {index} in row {roi}"
            )
    return [int(index) for index in indices]


def axis_corners(
    position: Tensor, size: int, margin: float
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Splits sampling positions along one axis into the two pixels around them.

    A position contributes if and only if it lies at most ``margin`` outside the centres of the
    first and the last pixel (never if it is NaN); it is then clamped to the image. Its gradient is
    the true one: zero where it is clamped, and right-sided at integers.

    Args:
        position: Coordinates in pixels, any shape.
        size: Pixels of the image along the axis.
        margin: In pixels.

    Returns:
        Which positions contribute, and twice ``(index, weight)``, all of the shape of
        ``position``; the weight is meaningless where the position does not contribute.
    """
    kept = (position >= -margin) & (position <= size - 1 + margin)
    position = position.where(kept, 0).clamp(0, size - 1)
    low = position.detach().floor()
    high = (low + 1).clamp(max=size - 1)
    return kept, [(low.long(), 1 - (position - low)), (high.long(), position - low)]


def padded_images(input: Tensor, classes: int, cells: int) -> Callable[[int], Tensor]:
    """Images as :func:`sum_of_samples` reads them, each prepared once, when it is first asked for.

    Args:
        input: Shape (N, C, H, W), channels in the order class, channel of the class, cell.
        classes: K.
        cells: G.

    Returns:
        A function that gives image n as (K, D, G, H*W + 1). The last pixel of a cell is zero: it
        stands for what does not contribute, for the pixel in its place may not be finite.
    """

    images = input.unbind()

    @functools.cache
    def image(n: int) -> Tensor:
        channels, height, width = images[n].shape
        channels //= classes * cells
        return with_zero_pixel(images[n].reshape(classes, channels, cells, height * width), 3)

    return image


def sum_of_samples(
    pixels: Tensor,
    width: int,
    cell: Tensor,
    rows: tuple[Tensor, list[tuple[Tensor, Tensor]]],
    columns: tuple[Tensor, list[tuple[Tensor, Tensor]]],
) -> Tensor:
    """Sums bilinear samples of one image over the grid of samples of each bin.

    Args:
        pixels: Shape (K, D, G, H*W + 1): K classes of D channels each, in G cells; see
            :func:`padded_images`.
        width: W.
        cell: Cell of each bin, int64, shape (Ph, Pw).
        rows: :func:`axis_corners` of positions (K, Ph, Pw, Sy).
        columns: The same of positions (K, Ph, Pw, Sx).

    Returns:
        Shape (K, D, Ph, Pw).
    """
    classes, channels, _, size = pixels.shape
    flat = pixels.flatten(2)
    kept = rows[0][..., :, None] & columns[0][..., None, :]
    base = cell[:, :, None, None] * size
    total = pixels.new_zeros(classes, channels, *cell.shape)
    for row, row_weight in rows[1]:
        for column, column_weight in columns[1]:
            index = row[..., :, None] * width + column[..., None, :]
            index = base + index.where(kept, size - 1)
            weight = (row_weight[..., :, None] * column_weight[..., None, :]).where(kept, 0)
            values = flat.gather(2, index.flatten(1)[:, None].expand(-1, channels, -1))
            values = values.unflatten(2, index.shape[1:])
            total = total + (values * weight[:, None]).sum((-2, -1))
    return total


def finite_or_zero(scale: Tensor) -> Tensor:
    """Keeps a gradient of zero from becoming NaN where a RoI is not finite."""
    return scale.where(scale.isfinite(), 0)


def keep_graph(output: Tensor, *inputs: Tensor | None) -> Tensor:
    """``output``, differentiable by every input even if none of them took part (no RoIs)."""
    for tensor in inputs:
        if tensor is not None:
            output = output + tensor[:0].sum().to(output.dtype)
    return output


def check_size(value: int | Sequence[int], name: str) -> list[int]:
    """Two sizes of at least one from an integer or a pair."""
    pair = list(value) if isinstance(value, Sequence) else [value, value]
    if len(pair) != 2 or any(not isinstance(v, int) or v < 1 for v in pair):
        raise ValueError(
            f"{name}: expected an integer or (vertical, horizontal), each >= 1, got {value}"
        )
    return pair


def check_rois(input: Tensor, rois: Tensor, **coordinates: Tensor | None) -> None:
    """Checks the shapes of ``input`` and ``rois`` and the devices and dtypes of all."""
    if input.dim() != 4 or input.shape[2] == 0 or input.shape[3] == 0:
        raise ValueError(
            f"input: expected shape (N, C, H, W) with H, W > 0, got {tuple(input.shape)}"
        )
    if not input.is_floating_point():
        raise ValueError(f"input: expected a floating-point dtype, got {input.dtype}")
    if rois.dim() != 2 or rois.shape[1] != 5:
        raise ValueError(f"rois: expected shape (R, 5), got {tuple(rois.shape)}")
    for name, tensor in {"rois": rois, **coordinates}.items():
        if tensor is None:
            continue
        if tensor.device != input.device:
            raise ValueError(f"{name}: expected on {input.device} as input, got {tensor.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")


def round_half_away(value: Tensor) -> Tensor:
    """Rounds as C does, halves away from zero; ``torch.round`` rounds them to even numbers."""
    whole = value.trunc()
    return whole + value.sign() * ((value - whole).abs() >= 0.5)

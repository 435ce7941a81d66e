"""Which points of the image one output reads through several deformable convolutions in a row.

    with record(detector, "backbone.layer4.**") as recording:
        detector.test_step(batch)
    points, weights = trace_points(recording[-3:], x=80, y=60)  # 9**3 points

Positions are (x, y) in pixels of the image, whose pixel i has its centre at i.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .recording import ConvolutionCall

__all__ = ["trace_points"]


def trace_points(
    calls: Sequence[ConvolutionCall],
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
        calls: Recorded calls, in the order in which they ran.
        x, y: Position in the image, pixels; the nearest output of the last layer is followed.
        image: Index in the batch. Default: 0.
        group: Deform group. Default: 0.
        offsets: Whether to apply the offsets; without them the points are those of plain
            convolutions of the same geometry, and all weights are 1. Default: True.

    Returns:
        The points (x, y) in pixels of the image, shape (P, 2), and their weights, shape (P,): the
        products of the modulations on the way.

    Raises:
        ValueError: ``calls`` is empty, or a layer has no such group.
    """
    if not calls:
        raise ValueError("calls must hold at least one recorded call, but is empty")
    points = calls[0].locations.new_tensor([[x, y]])
    weights = points.new_ones(1)
    for depth, call in enumerate(reversed(calls)):
        groups = call.locations.shape[1]
        if not 0 <= group < groups:
            raise ValueError(
                f"group must be between 0 and {groups - 1} in {call.name}, but got {group}"
            )
        height, width = call.output_size
        column, row = call.output_grid.to_map(points).round().long().unbind(1)
        if depth == 0:
            column, row = column.clamp(0, width - 1), row.clamp(0, height - 1)
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        column, row, weights = column[inside], row[inside], weights[inside]
        locations = call.locations[image, group] if offsets else call.grid[0, 0]
        points = locations[:, row, column]  # (K, outputs, 2)
        factors = torch.ones_like(points[..., 0])
        if offsets and call.weights is not None:
            factors = call.weights[image, group][:, row, column]
        points, weights = points.flatten(0, 1), (factors * weights).flatten()
    return points, weights

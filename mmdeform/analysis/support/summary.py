"""Numbers that describe maps and points of gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .sampling import LocationGradient

__all__ = ["field_summary", "layer_summary", "share_within", "strongest_samples"]


def field_summary(field: Tensor) -> dict[str, Any]:
    """Where a map of gradient norms lies and how large it is.

    Args:
        field: Norms, shape (H, W).

    Returns:
        ``sum`` and ``max`` of the norms; ``center``, their mean position (x, y), and ``radius``,
        the root mean square distance from it, both weighted by the norms, in pixels;
        ``side_of_half`` and ``side_of_95_percent``: the side of a square of as many pixels as hold
        that share of the sum, the largest norms first. All but the first two are None for a map of
        zeros.
    """
    norms = field.double()
    total = float(norms.sum())
    summary: dict[str, Any] = dict(sum=total, max=float(norms.max()))
    names = ("center", "radius", "side_of_half", "side_of_95_percent")
    if total == 0:
        return summary | dict.fromkeys(names)
    y, x = (torch.arange(size, device=field.device).double() for size in norms.shape)
    mean_x, mean_y = float(norms.sum(0) @ x) / total, float(norms.sum(1) @ y) / total
    spread = float(norms.sum(0) @ (x - mean_x) ** 2 + norms.sum(1) @ (y - mean_y) ** 2) / total
    held = norms.flatten().sort(descending=True).values.cumsum(0)
    sides = [float((held < share * total).sum() + 1) ** 0.5 for share in (0.5, 0.95)]
    return summary | dict(zip(names, ([mean_x, mean_y], spread**0.5, *sides), strict=True))


def share_within(field: Tensor, box: Sequence[float]) -> float:
    """Share of the sum of a map that lies in pixels whose centres are in a box.

    Args:
        field: Norms, shape (H, W).
        box: (x1, y1, x2, y2) in pixels of the map, where pixel i reaches from i to i + 1.
    """
    y, x = (torch.arange(size, device=field.device) + 0.5 for size in field.shape)
    inside = (y[:, None] > box[1]) & (y[:, None] < box[3]) & (x > box[0]) & (x < box[2])
    total = float(field.double().sum())
    return float(field[inside].double().sum()) / total if total else 0.0


def strongest_samples(
    gradients: Sequence[LocationGradient], count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The samples that a response depends on most, of several calls of layers.

    Args:
        gradients: See :func:`effective_sampling`.
        count: How many at most; samples without gradient are left out.

    Returns:
        Positions (x, y) in pixels of the image, shape (P, 2), norms, shape (P,), the largest first,
        and the index of the call of each in ``gradients``, int64, shape (P,).
    """
    norms = torch.cat([each.norms.flatten() for each in gradients])
    points = torch.cat([each.call.locations.flatten(0, -2).to(norms) for each in gradients])
    calls = torch.cat(
        [torch.full((each.norms.numel(),), index) for index, each in enumerate(gradients)]
    ).to(norms.device)
    order = norms.argsort(descending=True, stable=True)[:count]
    order = order[norms[order] > 0]
    return points[order], norms[order], calls[order]


def layer_summary(gradient: LocationGradient) -> dict[str, Any]:
    """What a call of a layer contributes.

    Returns:
        ``layer``, ``kind``, number of ``samples`` and of those with a gradient
        (``effective_samples``); ``sum`` and ``max`` of the norms; ``center``, the mean position
        (x, y), and ``radius``, the root mean square distance from it, weighted by the norms, in
        pixels of the image; None without a gradient.
    """
    norms = gradient.norms.double().flatten()
    points = gradient.call.locations.double().flatten(0, -2)
    used = norms > 0
    total = float(norms.sum())
    center = radius = None
    if total:
        weights, points = norms[used] / total, points[used]
        mean = weights @ points
        radius = float(weights @ (points - mean).square().sum(-1)) ** 0.5
        center = mean.tolist()
    return dict(
        layer=gradient.call.name,
        kind=gradient.call.kind,
        samples=norms.numel(),
        effective_samples=int(used.sum()),
        sum=total,
        max=float(norms.max()),
        center=center,
        radius=radius,
    )

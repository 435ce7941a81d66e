"""Arguments of dat_attn, and what its tests do with them."""

from collections.abc import Callable

import torch
from torch import Tensor

from mmdeform.ops import dat_attn

from .contracts.operator import TYPES, Arguments

DATA = ("query", "key", "value")


def query_places(size: int, align_corners: bool) -> Tensor:
    index = torch.arange(size, dtype=torch.float64)
    if not align_corners:
        return (2 * index + 1) / size - 1
    return 2 * index / (size - 1) - 1 if size > 1 else torch.zeros(1, dtype=torch.float64)


def off_cells(shape: tuple, size: int, table_size: int, align_corners: bool, far: float) -> Tensor:
    """Random coordinates in [-far, far] that keep all queries away from the table's cells.

    Numbers that bf16 holds exactly, the best of many; cells are where gradients jump.
    """
    candidates = (far * (2 * torch.rand(200, *shape) - 1)).bfloat16().double()
    displacement = (query_places(size, align_corners) - candidates[..., None]) / 2
    place = (displacement + 1) / 2 * (table_size - 1)
    if table_size == 1 or not candidates.numel() * size:  # everything lies on the one cell
        return candidates[0]
    best = (place - place.round()).abs().amin(-1).max(0)
    assert best.values.min() > 1e-3
    return candidates.gather(0, best.indices[None])[0]


def make(
    batch: int = 2,
    heads: int = 4,
    groups: int = 2,
    channels: int = 8,
    size: tuple[int, int] = (5, 7),
    keys: int = 11,
    table: tuple[int, int] = (9, 13),
    align_corners: bool = True,
    scale: float | None = None,
    far: float = 1.3,
) -> Arguments:
    """Random arguments; ``far`` > 1: some biases are read outside the table."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    positions = [
        off_cells((batch, groups, keys), size[axis], table[axis], align_corners, 2 * far - 1)
        for axis in (0, 1)
    ]
    return {
        "query": 1.5 * randn(batch, heads, channels, *size),
        "key": 1.5 * randn(batch, heads, channels, keys),
        "value": randn(batch, heads, channels, keys),
        "positions": torch.stack(positions, -1),
        "table": randn(heads, *table),
        "scale": scale,
        "align_corners": align_corners,
    }


def run(arguments: Arguments, function: Callable = dat_attn) -> dict[str, Tensor]:
    """Output, and gradients of a weighted sum of it."""
    leaves = {
        key: value.detach().requires_grad_()
        for key, value in arguments.items()
        if isinstance(value, Tensor)
    }
    output = function(**{**arguments, **leaves})
    # The sum alone would have no gradient with respect to logits where values are equal.
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
    grads = torch.autograd.grad((output * weights.view(output.shape)).sum(), list(leaves.values()))
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def place(arguments: Arguments, types: str, device: str) -> Arguments:
    """Copies the arguments to a device, in the dtypes ``TYPES[types]``, without gradients."""
    data, coordinates = TYPES[types]
    return {
        key: value.to(device, data if key in DATA else coordinates).clone()
        if isinstance(value, Tensor)
        else value
        for key, value in arguments.items()
    }


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for key, tensor in expected.items():
        limit = tolerance * max(1.0, tensor.double().abs().max().item())
        torch.testing.assert_close(
            actual[key].double(), tensor.double(), rtol=0, atol=limit, msg=lambda t, k=key: k + t
        )

"""Benchmark cases and peers of dat_attn."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdeform import ops

from .case import Case, Inputs, Operator, Peer

__all__ = ["OPERATOR", "make_case", "table_places"]


def query_places(size: int, align_corners: bool) -> Tensor:
    """Normalised places of rows, or columns, of queries, shape (size,)."""
    index = torch.arange(size, dtype=torch.float64)
    return 2 * index / (size - 1) - 1 if align_corners else (2 * index + 1) / size - 1


def table_places(positions: Tensor, size: int, table_size: int, align_corners: bool) -> Tensor:
    """Rows (columns) of the table that rows (columns) of queries read, shape (..., size)."""
    displacement = (query_places(size, align_corners) - positions[..., None]) / 2
    return (displacement + 1) / 2 * (table_size - 1)


def make_case(
    name: str,
    size: tuple[int, int],
    keys: tuple[int, int],
    table: tuple[int, int],
    *,
    heads: int = 12,
    groups: int = 3,
    channels: int = 32,
    align_corners: bool = True,
    batches: dict[str, tuple[int, ...]] | None = None,
) -> Case:
    """Deformable attention of a map, with keys around the points of a regular grid.

    Args:
        name: Name of the case.
        size: Rows and columns of queries.
        keys: Rows and columns of the grid.
        table: Rows and columns of the bias tables.
        heads: Number of heads.
        groups: Number of groups of heads that share positions.
        channels: Channels per head.
        align_corners: Where queries lie: True as in DAT++, False as in DAT.
        batches: See :class:`Case`.
    """

    def make(batch: int, generator: torch.Generator) -> Inputs:
        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def around(axis: int) -> Tensor:
            """Coordinates of keys, up to two steps of the grid off, shape (B, G, Hk, Wk)."""
            points = query_places(keys[axis], False)
            points = points[:, None] if axis == 0 else points
            noise = torch.rand((16, batch, groups, *keys), generator=generator, dtype=torch.float64)
            candidates = points + 2 * (2 * noise - 1) / keys[axis]
            # Of many the one that keeps all queries away from cells, where gradients jump.
            places = table_places(candidates, size[axis], table[axis], align_corners)
            distance = (places - places.round()).abs().amin(-1)
            return candidates.gather(0, distance.argmax(0, keepdim=True))[0]

        count = keys[0] * keys[1]
        return {
            "query": randn(batch, heads, channels, *size),
            "key": randn(batch, heads, channels, count),
            "value": randn(batch, heads, channels, count),
            "positions": torch.stack([around(0), around(1)], -1).flatten(2, 3),
            "table": randn(heads, *table),
            "scale": channels**-0.5,
            "align_corners": align_corners,
        }

    return Case(name, make, batches or {})


def _split(inputs: Inputs) -> Iterator[tuple[Inputs, tuple[slice, ...]]]:
    batch, heads = inputs["query"].shape[:2]
    groups = inputs["positions"].shape[1]
    for image in range(batch):
        for head in range(heads):
            group = head * groups // heads
            piece = (slice(image, image + 1), slice(head, head + 1))
            parts = {key: inputs[key][piece] for key in ("query", "key", "value")}
            parts["positions"] = inputs["positions"][piece[0], group : group + 1]
            parts["table"] = inputs["table"][piece[1]]
            yield {**inputs, **parts}, piece


def _samples(inputs: Inputs) -> int:
    batch, heads, _, height, width = inputs["query"].shape
    return batch * heads * height * width * inputs["key"].shape[3]


def _reference(**inputs: object) -> Tensor:
    return ops.dat_attn_reference(**inputs)[0]


def _load_reference(device_type: str) -> Callable[..., Tensor]:
    return _reference


def _load_grid_sample(device_type: str) -> Callable[..., Tensor]:
    return grid_sample_composition


def grid_sample_composition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    table: Tensor,
    scale: float,
    align_corners: bool,
) -> Tensor:
    """The published form: biases of all pairs by F.grid_sample, all logits in memory."""
    batch, heads, _, *size = query.shape
    places = [query_places(n, align_corners).to(positions) for n in size]
    grid = torch.stack(torch.meshgrid(*places, indexing="ij"), -1).flatten(0, 1)  # (H*W, 2)
    displacement = (grid[:, None] - positions.flatten(0, 1)[:, None]) * 0.5
    tables = table.unflatten(0, (positions.shape[1], -1)).repeat(batch, 1, 1, 1)
    bias = F.grid_sample(tables, displacement.flip(-1), align_corners=True)
    bias = bias.view(batch, heads, len(grid), -1)
    logits = query.flatten(3).transpose(2, 3) @ key * scale + bias
    output = logits.softmax(-1) @ value.transpose(2, 3)
    return output.transpose(2, 3).reshape(query.shape)


_BOTH = {"cpu": (1,), "cuda": (1, 2)}

OPERATOR = Operator(
    name="dat_attn",
    function=ops.dat_attn,
    reference=_reference,
    coordinates=("positions", "table"),
    split=_split,
    samples=_samples,
    peers=(
        Peer("grid_sample", _load_grid_sample, copies=8),
        Peer("reference", _load_reference, coordinates_as_data=False, copies=10),
    ),
    # The third stage of DAT-S++ and of DAT-T for an image of 800 x 1333 pixels, and of 224 x 224.
    cases=(
        make_case("50x84-1050keys", (50, 84), (25, 42), (27, 27), batches=_BOTH),
        make_case("50x84-4200keys", (50, 84), (50, 84), (27, 27), align_corners=False,
                  batches={"cuda": (1, 2)}),
        make_case("14x14-49keys", (14, 14), (7, 7), (27, 27), batches={"cpu": (8,)}),
        make_case("25x42-1050keys", (25, 42), (25, 42), (13, 13), heads=24, groups=6),
    ),
)  # fmt: skip

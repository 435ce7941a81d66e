"""Checkpoints of DAT: those of its authors, of classifiers and of detectors, and our own."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..loading import LoadReport, PublishedFormat, load_backbone

__all__ = ["DAT_FORMAT", "load_dat_checkpoint"]

BUFFERS = ("attn_mask", "relative_position_index")  # constants that the public code stores
TABLES = ("relative_position_bias_table", "rpe_table", "rpb")


class _Published(PublishedFormat):
    def rename(self, key: str) -> str | None:
        if key.rpartition(".")[2] in BUFFERS:
            return None
        # The authors' detectors and classifiers name the weight of a layer scale differently.
        return re.sub(r"(layer_scales\.\d+)\.gamma$", r"\1.weight", key)

    def resize(self, model: nn.Module, key: str, value: Tensor, shape: torch.Size) -> Tensor | None:
        owner = model.get_submodule(key.rpartition(".")[0])
        return _resize(key, value, shape, getattr(owner, "position_bias", None) == "fixed")


DAT_FORMAT = _Published(classifier=("cls_norm", "cls_head"), head="cls_head")


def load_dat_checkpoint(
    model: nn.Module,
    checkpoint: str | os.PathLike | Mapping[str, Any],
    prefix: str | None = None,
    map_location: str | torch.device = "cpu",
    logger: Any = "current",
) -> LoadReport:
    """Loads weights into a :class:`DAT`, in place, and logs what fitted.

    Tables of position biases that were made for another window or map are resized, bicubically as
    in the public code. Arguments and errors are those of :func:`load_backbone`; ``checkpoint`` may
    be one of the authors' classifiers (``model``) or detectors (``state_dict``).
    """
    return load_backbone(model, checkpoint, DAT_FORMAT, prefix, map_location, logger)


def _resize(key: str, table: Tensor, shape: torch.Size, fixed: bool) -> Tensor | None:
    """A table of position biases for another size; None if this is none, or of other heads.

    Args:
        key: Its name.
        table: (L**2, M) in window attention, else (M, rows, columns).
        shape: The shape to give it.
        fixed: Rows are the pixels of a square map of queries, and columns those of one of keys.
    """
    if key.rpartition(".")[2] not in TABLES or table.ndim != len(shape):
        return None
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    if table.ndim == 2:
        if table.shape[1] != shape[1]:
            return None
        maps = _unflatten(table.t())
        side = math.isqrt(shape[0])
        return None if maps is None else _bicubic(maps, (side, side)).flatten(1).t()
    if table.ndim != 3 or table.shape[0] != shape[0]:
        return None
    if not fixed:  # of displacements: (M, 2H - 1, 2W - 1), or of neighbours
        return _bicubic(table, shape[1:]) if table.shape[1] % 2 and table.shape[2] % 2 else None
    for length in shape[2], shape[1]:  # keys, and then, exchanged with them, queries
        maps, side = _unflatten(table), math.isqrt(length)
        if maps is None or side**2 != length:
            return None
        table = _bicubic(maps.flatten(0, 1), (side, side)).view(*maps.shape[:2], length)
        table = table.transpose(1, 2)
    return table


def _unflatten(table: Tensor) -> Tensor | None:
    """(..., L**2) to (..., L, L), or None where the length is no square."""
    side = math.isqrt(table.shape[-1])
    return table.unflatten(-1, (side, side)) if side**2 == table.shape[-1] else None


def _bicubic(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(N, h, w) to (N, *size), as the public code does it: without aligned corners."""
    return F.interpolate(maps[None], tuple(size), mode="bicubic", align_corners=False)[0]

"""Checkpoints of DAT: those of its authors, of classifiers and of detectors, and our own."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from .reading import State, find_state_dict, read_checkpoint, some

__all__ = ["LoadReport", "load_dat_checkpoint"]

BUFFERS = ("attn_mask", "relative_position_index")  # constants that the public code stores
CLASSIFIER = ("cls_norm", "cls_head")
TABLES = ("relative_position_bias_table", "rpe_table", "rpb")


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What became of the entries of a model and of a checkpoint.

    Attributes:
        loaded: Entries of the model that got values of the checkpoint.
        resized: Those of them that are tables made for another size.
        missing: Entries of the model that keep their values.
        unexpected: Entries of the checkpoint that the model has no place for. Constants that
            published checkpoints hold do not count, nor does a classifier if the model is none.
    """

    loaded: list[str]
    resized: list[str]
    missing: list[str]
    unexpected: list[str]


def load_dat_checkpoint(
    model: nn.Module,
    checkpoint: str | os.PathLike | Mapping[str, Any],
    prefix: str | None = None,
    map_location: str | torch.device = "cpu",
    logger: Any = "current",
) -> LoadReport:
    """Loads weights into a :class:`DAT`, in place, and logs what fitted.

    Tables of position biases that were made for another window or map are resized, bicubically as
    in the public code. A classification layer for another number of classes is left out.

    Args:
        model: The backbone or classifier.
        checkpoint: Path, URL (see :func:`read_checkpoint`), or what a checkpoint holds: a dict with
            ``model`` (the authors' classifiers) or ``state_dict`` (detectors, theirs and
            mmengine's), or a bare state dict.
        prefix: Takes entries whose names begin so, without this part. Default: 'backbone.' if there
            are such entries, else all. A leading 'module.' never matters.
        map_location: Where tensors of a file are put before they are copied. Default: 'cpu'.
        logger: Of mmengine's ``print_log``. Default: 'current'.

    Raises:
        ValueError: The checkpoint has no weights, none that fit, or some of another shape.
        pickle.UnpicklingError: See :func:`read_checkpoint`.
    """
    if isinstance(checkpoint, Mapping):
        name = "checkpoint"
    else:
        name = os.fspath(checkpoint)
        checkpoint = read_checkpoint(name, map_location)
    source = _of_backbone(find_state_dict(checkpoint, name), prefix, name)
    fitting, resized, unexpected = _fit(model, source, name)
    own = model.state_dict()
    if not fitting:
        raise ValueError(
            f"{name}: no entry fits the model; expected names such as {some(own)}, "
            f"got {some(source)}"
        )
    missing = [key for key in own if key not in fitting]
    model.load_state_dict(fitting, strict=False)
    report = LoadReport(list(fitting), resized, missing, unexpected)
    print_log(_summary(report, len(own), name), logger)
    return report


def _of_backbone(state: State, prefix: str | None, name: str) -> State:
    """The entries of the backbone, named as in the model; without constants of the public code."""
    if prefix is None:
        prefix = "backbone." if any(key.startswith("backbone.") for key in state) else ""
    elif prefix and not prefix.endswith("."):
        prefix += "."
    found = {
        # The authors' detectors and classifiers name the weight of a layer scale differently.
        re.sub(r"(layer_scales\.\d+)\.gamma$", r"\1.weight", key.removeprefix(prefix)): value
        for key, value in state.items()
        if key.startswith(prefix) and key.rpartition(".")[2] not in BUFFERS
    }
    if not found:
        first = sorted({key.partition(".")[0] for key in state})
        raise ValueError(f"{name}: no entry begins with prefix {prefix!r}; they begin with {first}")
    return found


def _fit(
    model: nn.Module, source: State, name: str
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Entries in the shapes of the model, names of those resized, and names that it lacks.

    Raises:
        ValueError: Shapes differ.
    """
    own = model.state_dict()
    is_classifier = any(key.partition(".")[0] in CLASSIFIER for key in own)
    fitting, resized, unexpected, wrong = {}, [], [], []
    for key, value in source.items():
        of_classifier = key.partition(".")[0] in CLASSIFIER
        if key not in own:
            if is_classifier or not of_classifier:
                unexpected.append(key)
            continue
        if value.shape != own[key].shape:
            fixed = getattr(_owner(model, key), "position_bias", None) == "fixed"
            table = _resize(key, value, own[key].shape, fixed)
            if table is None:
                if key.startswith("cls_head."):
                    unexpected.append(key)
                else:
                    wrong.append(f"{key} {tuple(own[key].shape)}, got {tuple(value.shape)}")
                continue
            resized.append(key)
            value = table
        fitting[key] = value
    if wrong:
        raise ValueError(
            f"{name}: {len(wrong)} entries have another shape than the model's; expected "
            + "; ".join(wrong[:5])
            + ("; ..." if len(wrong) > 5 else "")
        )
    return fitting, resized, unexpected


def _owner(model: nn.Module, key: str) -> nn.Module:
    return model.get_submodule(key.rpartition(".")[0])


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


def _summary(report: LoadReport, entries: int, name: str) -> str:
    lines = [f"DAT: {len(report.loaded)} of {entries} entries loaded from {name}"]
    for what, keys in (
        ("resized tables", report.resized),
        ("missing there, unchanged here", report.missing),
        ("not used", report.unexpected),
    ):
        if keys:
            lines.append(f"{len(keys)} {what}: {', '.join(keys)}")
    return "\n".join(lines)

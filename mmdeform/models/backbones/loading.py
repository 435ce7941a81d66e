"""Loading checkpoints, published ones and our own, into backbones, and telling what fitted."""

import dataclasses
import os
import textwrap
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from .reading import State, find_state_dict, read_checkpoint, some

__all__ = ["LoadReport", "PublishedFormat", "load_backbone", "load_exactly"]


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


@dataclasses.dataclass(frozen=True)
class PublishedFormat:
    """How a family's authors store weights.

    Attributes:
        classifier: Modules that classifiers alone have.
        head: The one of them whose shape depends on the number of classes.
        containers: Where a checkpoint may hold the weights, in order of preference.
    """

    classifier: tuple[str, ...]
    head: str
    containers: tuple[str, ...] = ("state_dict", "model")

    def rename(self, key: str) -> str | None:
        """The name that the model has for an entry; None for constants, which are left out."""
        return key

    def resize(self, model: nn.Module, key: str, value: Tensor, shape: torch.Size) -> Tensor | None:
        """An entry in another shape; None if it cannot be brought to it."""
        return None


def load_backbone(
    model: nn.Module,
    checkpoint: str | os.PathLike | Mapping[str, Any],
    published: PublishedFormat,
    prefix: str | None = None,
    map_location: str | torch.device = "cpu",
    logger: Any = "current",
) -> LoadReport:
    """Loads weights into a backbone or classifier, in place, and logs what fitted.

    A classification layer for another number of classes is left out.

    Args:
        model: The backbone or classifier.
        checkpoint: Path, URL (see :func:`read_checkpoint`), or what a checkpoint holds: a dict with
            weights in one of ``published.containers``, or a bare state dict.
        published: The format of the model's family.
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
    state = find_state_dict(checkpoint, name, published.containers)
    source = _of_backbone(state, prefix, name, published)
    fitting, resized, unexpected = _fit(model, source, name, published)
    own = model.state_dict()
    if not fitting:
        raise ValueError(
            f"{name}: no entry fits the model; expected names such as {some(own)}, "
            f"got {some(source)}"
        )
    missing = [key for key in own if key not in fitting]
    model.load_state_dict(fitting, strict=False)
    report = LoadReport(list(fitting), resized, missing, unexpected)
    print_log(_summary(report, len(own), name, type(model).__name__), logger)
    return report


def load_exactly(model: nn.Module, state: State, name: str, assign: bool = False) -> None:
    """Gives a model the tensors of a state dict, which has to fit without exception.

    Args:
        model: The model.
        state: Its weights.
        name: Of the checkpoint, for errors.
        assign: The model takes these tensors themselves, as one on the meta device has to. Default:
            False.

    Raises:
        ValueError: Names or shapes differ.
    """
    try:
        model.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        reasons = [textwrap.shorten(line, 200) for line in str(error).splitlines()[1:4]]
        raise ValueError(
            f"{name} holds weights of another model than that given: {'; '.join(reasons)}"
        ) from None


def _of_backbone(state: State, prefix: str | None, name: str, published: PublishedFormat) -> State:
    """The entries of the backbone, named as in the model; without constants of the public code."""
    if prefix is None:
        prefix = "backbone." if any(key.startswith("backbone.") for key in state) else ""
    elif prefix and not prefix.endswith("."):
        prefix += "."
    found = {
        renamed: value
        for key, value in state.items()
        if key.startswith(prefix)
        and (renamed := published.rename(key.removeprefix(prefix))) is not None
    }
    if not found:
        first = sorted({key.partition(".")[0] for key in state})
        raise ValueError(f"{name}: no entry begins with prefix {prefix!r}; they begin with {first}")
    return found


def _fit(
    model: nn.Module, source: State, name: str, published: PublishedFormat
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Entries in the shapes of the model, names of those resized, and names that it lacks.

    Raises:
        ValueError: Shapes differ.
    """
    own = model.state_dict()
    is_classifier = any(_module(key) in published.classifier for key in own)
    fitting, resized, unexpected, wrong = {}, [], [], []
    for key, value in source.items():
        if key not in own:
            if is_classifier or _module(key) not in published.classifier:
                unexpected.append(key)
            continue
        if value.shape != own[key].shape:
            table = published.resize(model, key, value, own[key].shape)
            if table is None:
                if _module(key) == published.head:
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


def _module(key: str) -> str:
    return key.partition(".")[0]


def _summary(report: LoadReport, entries: int, name: str, model: str) -> str:
    lines = [f"{model}: {len(report.loaded)} of {entries} entries loaded from {name}"]
    for what, keys in (
        ("resized tables", report.resized),
        ("missing there, unchanged here", report.missing),
        ("not used", report.unexpected),
    ):
        if keys:
            lines.append(f"{len(keys)} {what}: {', '.join(keys)}")
    return "\n".join(lines)

"""The checkpoints of a training run, in their order."""

import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Checkpoint", "find_checkpoints", "load_weights", "order_checkpoints"]

SAVED = re.compile(r"(epoch|iter)_(\d+)\.pth")  # as mmengine's CheckpointHook names them


@dataclass(frozen=True)
class Checkpoint:
    """A file with the weights of a model.

    Attributes:
        path: The file.
        epoch: After how many epochs it was saved; None if it is not known.
        iteration: After how many iterations it was saved; None if it is not known.
    """

    path: Path
    epoch: int | None = None
    iteration: int | None = None


def find_checkpoints(paths: Iterable[Path]) -> list[Path]:
    """Files of checkpoints, each once.

    Args:
        paths: Files, and folders of runs, for which their ``epoch_*.pth`` and ``iter_*.pth`` stand.
            Best ones are copies of others.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: A folder has no checkpoints.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if SAVED.fullmatch(file.name))
            if not files:
                raise ValueError(f"{path} has no checkpoint: expected epoch_1.pth or iter_100.pth")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def order_checkpoints(paths: Sequence[Path], model: nn.Module) -> list[Checkpoint]:
    """Reads when checkpoints were saved, and makes sure that all of them fit a model.

    Only what is needed for that is read of large files.

    Args:
        paths: Files.
        model: Whose weights they have to hold.

    Returns:
        In the order in which they were saved, by their iterations, or by their epochs.

    Raises:
        ValueError: One cannot be read, or does not fit the model, or there are several and of one
            it is not known when it was saved.
    """
    checkpoints = []
    for path in paths:
        content = _read(path)
        _check(path, _state(path, content), model)
        checkpoints.append(Checkpoint(path, *_saved_at(path, content)))
    if len(checkpoints) < 2:
        return checkpoints
    for unit in ("iteration", "epoch"):
        if all(getattr(checkpoint, unit) is not None for checkpoint in checkpoints):
            return sorted(checkpoints, key=lambda checkpoint: getattr(checkpoint, unit))
    unknown = next(c.path for c in checkpoints if c.iteration is None or c.epoch is None)
    raise ValueError(
        f"{unknown}: expected the number of the epoch or iteration in its meta data, as mmengine "
        "saves it, or in its name, as in epoch_3.pth; without it checkpoints have no order"
    )


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a checkpoint into a model, all of it.

    Raises:
        ValueError: It cannot be read, or does not fit the model.
    """
    state = _state(path, _read(path))
    _check(path, state, model)
    model.load_state_dict(state)


def _read(path: Path) -> Any:
    try:
        return torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except OSError:
        raise
    except Exception as error:  # what is no checkpoint fails in torch in any way
        raise ValueError(
            f"{path}: expected a checkpoint, got a file that torch cannot read as one "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        ) from error


def _state(path: Path, content: Any) -> dict[str, Tensor]:
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if (
        not isinstance(state, Mapping)
        or not state
        or not all(isinstance(value, Tensor) for value in state.values())
    ):
        raise ValueError(f"{path}: expected a checkpoint with tensors in 'state_dict'")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _check(path: Path, state: Mapping[str, Tensor], model: nn.Module) -> None:
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    faults = []
    for verb, names in (("lacks", own.keys() - given.keys()), ("adds", given.keys() - own.keys())):
        if names:
            faults.append(f"{verb} {len(names)} of its weights, such as {min(names)}")
    for name in sorted(own.keys() & given.keys()):
        if own[name] != given[name]:
            faults.append(f"has {name} of shape {given[name]} where it has {own[name]}")
            break
    if faults:
        raise ValueError(
            f"{path} does not fit the {type(model).__name__} of the config: it "
            + "; it ".join(faults)
        )


def _saved_at(path: Path, content: Any) -> tuple[int | None, int | None]:
    """(epoch, iteration): as mmengine noted them, or else what the name tells."""
    meta = content.get("meta") or {}
    epoch, iteration = meta.get("epoch"), meta.get("iter")
    named = SAVED.search(path.name)
    if named and epoch is None and iteration is None:
        number = int(named[2])
        return (number, None) if named[1] == "epoch" else (None, number)
    return epoch, iteration

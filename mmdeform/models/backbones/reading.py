"""Reading checkpoints as data: what asks to run code is refused before it runs."""

import io
import os
import pickle
import re
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine import dist, fileio
from torch import Tensor

__all__ = ["State", "find_state_dict", "read_checkpoint", "some"]

State = Mapping[str, Tensor]


def read_checkpoint(path: str | os.PathLike, map_location: str | torch.device = "cpu") -> Any:
    """Reads a checkpoint without running code that it may hold.

    Configurations in the authors' checkpoints (``yacs.config.CfgNode``) are read as dicts; yacs is
    not needed.

    Args:
        path: Path, URL that begins with http:// or https:// (the file is kept where ``torch.hub``
            keeps files), or another URL that mmengine has a file backend for.
        map_location: Where tensors are put. Default: 'cpu'.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no checkpoint.
        pickle.UnpicklingError: The file holds more than tensors, numbers, texts, lists and dicts.
    """
    path = os.fspath(path)
    try:
        with torch.serialization.safe_globals([(_CfgNode, "yacs.config.CfgNode")]):
            if path.startswith(("http://", "https://")):
                return _read_url(path, map_location)
            file: Any = Path(path).expanduser()
            if "://" in path:
                file = io.BytesIO(fileio.get(path))
            return torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {found[1]}" if found else str(error).partition("\n")[0]
        raise pickle.UnpicklingError(
            f"{path}: expected a checkpoint made of tensors, numbers, texts, lists and dicts, but "
            f"{what}; nothing of it was run. Only if you trust its source: load it with "
            "torch.load(path, weights_only=False) and save its weights alone, as dict(model=...)"
        ) from error
    except OSError:
        raise
    except Exception as error:  # bytes that are something else fail in torch in any way
        raise ValueError(
            f"{path}: expected a file of torch.save, got one that cannot be read as such "
            f"({type(error).__name__}: {error})"
        ) from error


def _read_url(url: str, map_location: str | torch.device) -> Any:
    rank = dist.get_rank()
    for turn in (rank == 0, rank != 0):  # the first process downloads, the others find the file
        if turn:
            checkpoint = torch.hub.load_state_dict_from_url(
                url, map_location=map_location, progress=sys.stderr.isatty(), weights_only=True
            )
        dist.barrier()
    return checkpoint


class _CfgNode:
    """Stands in for yacs' class while a checkpoint is read: becomes a plain dict, runs nothing."""

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict()  # torch fills no other kind of dict


def find_state_dict(
    checkpoint: Any, name: str = "checkpoint", containers: Sequence[str] = ("state_dict", "model")
) -> State:
    """The weights in what a checkpoint holds, under the names that they have there.

    Args:
        checkpoint: Dict with weights under one of ``containers``, or a state dict.
        name: Of the checkpoint, for errors.
        containers: Names in order of preference. Default: 'state_dict', then 'model'.

    Raises:
        ValueError: It is something else.
    """
    state = checkpoint
    if isinstance(checkpoint, Mapping):
        for key in containers:
            if isinstance(checkpoint.get(key), Mapping):
                state = checkpoint[key]
                break
    if (
        not isinstance(state, Mapping)
        or not state
        or not all(isinstance(value, Tensor) for value in state.values())
    ):
        got = some(checkpoint) if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        known = " or ".join(map(repr, containers))
        raise ValueError(
            f"{name}: expected a dict with tensors in {known}, or a state dict, got {got}"
        )
    return {key.removeprefix("module."): value for key, value in state.items()}


def some(keys: Any, count: int = 5) -> str:
    """The first few, for errors."""
    return str(list(keys)[:count])[1:-1] + (", ..." if len(keys) > count else "")

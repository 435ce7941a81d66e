"""Config overrides that must mean something: misspelt keys and changes of nothing are errors."""

import copy
import hashlib
import inspect
import json
from collections.abc import Mapping
from typing import Any

from mmengine import Config
from mmengine.runner import Runner

from .spec import suggestion

DELETE = "_delete_"
# What training reads from a config; other names are variables with which a config file is written.
READ_KEYS = {
    *inspect.signature(Runner.__init__).parameters,
    "model_wrapper_cfg", "custom_imports", "runner_type", "compile",
} - {"self", "cfg", "work_dir"}  # fmt: skip


def apply_overrides(cfg: Config, overrides: Mapping[str, Any]) -> Config:
    """A copy of a config with overrides.

    Args:
        cfg (Config): Stays as it is.
        overrides (Mapping): Dotted keys, as of ``--cfg-options``, or nested ones, made in their
            order. Dicts are merged; with ``_delete_`` they replace what was there. Parts of lists
            are named by index.

    Raises:
        ValueError: A key names a part that is not there or that training does not read, or nothing
            changes.
    """
    changed = copy.deepcopy(cfg)
    for key, value in overrides.items():  # one by one: some may lie within others
        if not isinstance(key, str):
            raise ValueError(f"expected a dotted name, got {key!r}")
        content = changed.to_dict()
        _check_root(content, key.split(".")[0])
        _check(content, key.split("."), value, "")
        changed.merge_from_dict({key: copy.deepcopy(value)})
    if canonical(changed) == canonical(cfg):
        raise ValueError(f"{', '.join(overrides) or 'no override'}: changes nothing")
    return changed


def canonical(cfg: Config) -> str:
    """What a config says, whatever the order of its keys; lists and tuples are alike."""
    return json.dumps(cfg.to_dict(), sort_keys=True, default=repr)


def config_hash(cfg: Config) -> str:
    """Sixteen hexadecimal digits that tell configs apart."""
    return hashlib.sha256(canonical(cfg).encode()).hexdigest()[:16]


def _check_root(cfg: Mapping[str, Any], name: str) -> None:
    if name in READ_KEYS:
        return
    if name in cfg:
        raise ValueError(
            f"{name} is a variable of the config file, which training does not read: override what "
            "is made of it"
        )
    raise ValueError(f"{name} is no part of a config{suggestion(name, READ_KEYS)}")


def _check(node: Any, parts: list[str], value: Any, path: str) -> None:
    """Whether ``parts`` lead somewhere in ``node``, which lies at ``path``."""
    name, *rest = parts
    here = f"{path}.{name}" if path else name
    if isinstance(node, (list, tuple)):
        if isinstance(node, tuple) or not name.isdigit() or int(name) >= len(node):
            raise ValueError(f"{path} is a {type(node).__name__} of {len(node)}: no {here}")
        there, child = True, node[int(name)]
    elif isinstance(node, Mapping):
        there, child = name in node, node.get(name)
    else:
        raise ValueError(
            f"{path} is {node!r} in the base config: {here} needs {DELETE}: true beside it"
        )
    if rest:
        if not there:
            raise ValueError(f"{here} is not in the base config{suggestion(name, node)}")
        _check(child, rest, value, here)
    elif isinstance(value, Mapping):
        if DELETE in value and not there:
            raise ValueError(f"{here}: {DELETE} where nothing is to be deleted")
        if there and not value.get(DELETE):
            for key, part in value.items():
                _check(child, [str(key)], part, here)

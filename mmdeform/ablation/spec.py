"""Specs of ablations: a base config, axes of named overrides, and which of their combinations."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from mmengine import Config

from .data import check_data, without_masks

KEYS = (
    "name", "base", "overrides", "axes", "exclude", "rows", "base_row", "seeds", "metrics", "data",
    "resources",
)  # fmt: skip
RESOURCES = ("parallel", "cpu_threads", "gpus", "timeout_min", "slurm")
BY_BASE = "by_base"
CONFIG = "config"
ABSENT = "-"  # the label of a row on an axis that does not apply to it
_NAME = "letters, digits, '.', '+' and '-'"


@dataclass(frozen=True)
class Axis:
    """Alternatives for one decision.

    Attributes:
        values (dict[str, dict]): Overrides of each alternative, by its name, as of
            ``--cfg-options``: dotted keys, or dicts, which are merged. ``by_base`` maps names of
            bases to overrides that go with one of them. ``config`` is a config that takes the place
            of the base; the overrides of all axes are then made in it.
        when (dict[str, tuple[str, ...]]): For which values of earlier axes this one applies; with
            several axes, all have to agree.
    """

    values: dict[str, dict[str, Any]]
    when: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def applies_to(self, labels: Mapping[str, str]) -> bool:
        return all(labels[axis] in values for axis, values in self.when.items())


@dataclass(frozen=True)
class Resources:
    """What runs get.

    Attributes:
        parallel (int): Runs at a time.
        cpu_threads (int): Threads of each run.
        gpus (int): 1 if each run has a GPU of its own; 0 trains on the CPU.
        timeout_min (int): Minutes after which a run is stopped.
        slurm (dict): More parameters of submitit's Slurm executor, as ``slurm_partition``.
    """

    parallel: int = 1
    cpu_threads: int = 1
    gpus: int = 0
    timeout_min: int = 7 * 24 * 60
    slurm: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Spec:
    """An ablation as it is written down.

    Attributes:
        name (str): Of the ablation.
        bases (dict[str, str]): Config files, or ``package::`` names, by the name of their data set;
            ``{"": FILE}`` where there is only one.
        axes (dict[str, Axis]): By name.
        base_row (dict[str, str]): Labels of the row with which the others are compared.
        combinations (tuple[dict[str, str], ...]): Labels of all rows.
        metrics (tuple[str, ...]): What a finished run must have measured; the first is the one that
            is watched.
        seeds (tuple[int, ...]): With which each row is trained.
        overrides (dict): Of all rows.
        data (dict, optional): A data set in place of the one that the base has; see
            :func:`mmdeform.ablation.use_coco_data`.
        resources (Resources): For the runs.
    """

    name: str
    bases: dict[str, str]
    axes: dict[str, Axis]
    base_row: dict[str, str]
    combinations: tuple[dict[str, str], ...]
    metrics: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    overrides: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] | None = None
    resources: Resources = field(default_factory=Resources)

    def with_data(self, data: Mapping[str, Any]) -> "Spec":
        """On another data set, and without the metrics of masks if that has none.

        Raises:
            ValueError: Something of it is missing or unknown.
        """
        check_data(data)
        metrics = without_masks(self.metrics, data)
        if not metrics:
            raise ValueError(f"metrics: expected one without masks, got {', '.join(self.metrics)}")
        return replace(self, data=dict(data), metrics=metrics)


def load_spec(path: str | Path) -> Spec:
    """Reads a spec from a YAML file, or from a Python file with the same keys as variables.

    Args:
        path (str or Path): The file. Config files that it names are relative to its folder.

    Raises:
        ValueError: What is wrong in it, and where.
    """
    path = Path(path)
    if path.suffix not in (".yml", ".yaml", ".py"):
        raise ValueError(f"{path}: expected a spec that ends in .yml, .yaml or .py")
    try:
        if path.suffix == ".py":
            content = Config.fromfile(path).to_dict()
        else:
            content = yaml.safe_load(path.read_text())
        return make_spec(content, path.parent)
    except (ValueError, yaml.YAMLError, OSError, SyntaxError) as error:
        raise ValueError(f"{path}: {error}") from error


def make_spec(content: Any, folder: Path) -> Spec:
    """A spec from what its file holds; see :func:`load_spec`."""
    _known(_mapping(content, "the spec"), KEYS, "key")
    for key in ("name", "base", "axes", "metrics"):
        if key not in content:
            raise ValueError(f"{key!r} is missing")
    if not _is_name(content["name"]):
        raise ValueError(f"name: expected {_NAME}, got {content['name']!r}")
    axes = _axes(_mapping(content["axes"], "axes"))
    combinations = _combinations(content, axes)
    bases = _bases(content["base"], folder)
    for name, axis in axes.items():
        for label, overrides in axis.values.items():
            where = f"axes: {name}: {label}"
            overrides = _resolve_config(overrides, where, folder)
            parts = _mapping(overrides.get(BY_BASE, {}), f"{where}: {BY_BASE}")
            _known(parts, bases, f"base in {BY_BASE!r} of {label!r}")
            if parts:
                overrides[BY_BASE] = {
                    base: _resolve_config(part, f"{where}: {BY_BASE}: {base}", folder)
                    for base, part in parts.items()
                }
            axis.values[label] = overrides
    base_row = _complete(content.get("base_row") or {}, axes, "base_row")
    if base_row not in combinations:
        raise ValueError(f"base_row: {base_row} is none of the rows")
    spec = Spec(
        name=content["name"],
        bases=bases,
        axes=axes,
        base_row=base_row,
        combinations=combinations,
        metrics=_list(content["metrics"], str, "metrics"),
        seeds=_list(content.get("seeds", [0]), int, "seeds"),
        overrides=_mapping(content.get("overrides") or {}, "overrides"),
        resources=_resources(_mapping(content.get("resources") or {}, "resources")),
    )
    return spec if content.get("data") is None else spec.with_data(content["data"])


def row_name(labels: Mapping[str, str]) -> str:
    """The name of a row, which is also that of its folder: its values, joined by ``_``."""
    return "_".join(value for value in labels.values() if value != ABSENT)


def suggestion(name: str, known: Any) -> str:
    """``", did you mean 'seeds'?"``, or nothing."""
    close = difflib.get_close_matches(str(name), [str(word) for word in known], 1)
    return f", did you mean {close[0]!r}?" if close else ""


def _known(names: Any, known: Any, kind: str) -> None:
    for name in names:
        if name not in known:
            known_ones = f"known: {', '.join(known)}"
            raise ValueError(f"unknown {kind}: {name!r}{suggestion(name, known)} ({known_ones})")


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected keys with values, got {value!r}")
    return dict(value)


def _list(value: Any, kind: type, where: str) -> tuple:
    good = isinstance(value, (list, tuple)) and value
    if not good or any(type(item) is not kind for item in value) or len(set(value)) < len(value):
        raise ValueError(f"{where}: expected a list of different {kind.__name__}, got {value!r}")
    return tuple(value)


def _is_name(value: Any) -> bool:
    return (
        isinstance(value, str)
        and value.replace("-", "").replace("+", "").replace(".", "").isalnum()
        and value.isascii()
    )


def _bases(value: Any, folder: Path) -> dict[str, str]:
    bases = {"": value} if isinstance(value, str) else _mapping(value, "base")
    if not bases or any(not isinstance(path, str) for path in bases.values()):
        raise ValueError(f"base: expected a config, or configs by data set, got {value!r}")
    return {name: _config_path(path, folder) for name, path in bases.items()}


def _config_path(path: str, folder: Path) -> str:
    return path if "::" in path else str(folder / path)


def _resolve_config(overrides: Any, where: str, folder: Path) -> dict[str, Any]:
    """Overrides with the path of the config among them, if there is one."""
    overrides = _mapping({} if overrides is None else overrides, where)
    if CONFIG in overrides:
        if not isinstance(overrides[CONFIG], str):
            raise ValueError(f"{where}: {CONFIG}: expected a file, got {overrides[CONFIG]!r}")
        overrides[CONFIG] = _config_path(overrides[CONFIG], folder)
    return overrides


def _axes(content: dict[str, Any]) -> dict[str, Axis]:
    if not content:
        raise ValueError("axes: expected at least one axis")
    axes: dict[str, Axis] = {}
    for name, value in content.items():
        where = f"axes: {name}"
        value, when = _mapping(value, where), {}
        if "values" in value:
            _known(value, ("values", "when"), f"key of axis {name!r}")
            when = _mapping(value.get("when") or {}, f"{where}: when")
            value = _mapping(value["values"], where)
        if not value:
            raise ValueError(f"{where}: expected at least one value")
        for label, overrides in value.items():
            if not _is_name(label) or label == ABSENT:
                raise ValueError(f"{where}: expected a name of {_NAME}, in quotes, got {label!r}")
            value[label] = _mapping({} if overrides is None else overrides, f"{where}: {label}")
        _known(when, axes, f"earlier axis in 'when' of {name!r}")
        for other, labels in when.items():
            labels = (labels,) if isinstance(labels, str) else tuple(labels)
            _known(labels, axes[other].values, f"value of {other!r}")
            when[other] = labels
        axes[name] = Axis(value, when)
    return axes


def _combinations(content: dict[str, Any], axes: dict[str, Axis]) -> tuple[dict[str, str], ...]:
    if "rows" in content:
        if "exclude" in content:
            raise ValueError("exclude: leave those out of 'rows'")
        rows = [_complete(row, axes, "rows") for row in content["rows"]]
    else:
        rows = list(_grid(axes, {}))
        for part in content.get("exclude") or ():
            _check_labels(part, axes, "exclude")
            kept = [row for row in rows if not part.items() <= row.items()]
            if len(kept) == len(rows):
                raise ValueError(f"exclude: {part} excludes no row")
            rows = kept
    names = [row_name(row) for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two rows are called {name!r}; rename values, or remove one")
    return tuple(rows)


def _grid(axes: dict[str, Axis], labels: dict[str, str]) -> Iterator[dict[str, str]]:
    if len(labels) == len(axes):
        yield labels
        return
    name = list(axes)[len(labels)]
    applies = axes[name].applies_to(labels)
    for value in axes[name].values if applies else (ABSENT,):
        yield from _grid(axes, {**labels, name: value})


def _check_labels(part: Any, axes: dict[str, Axis], where: str) -> None:
    part = _mapping(part, where)
    _known(part, axes, f"axis in {where!r}")
    for name, value in part.items():
        _known([value], [*axes[name].values, ABSENT], f"value of {name!r} in {where!r}")


def _complete(part: Any, axes: dict[str, Axis], where: str) -> dict[str, str]:
    """Labels on all axes: the first value where none is given."""
    _check_labels(part, axes, where)
    labels: dict[str, str] = {}
    for name, axis in axes.items():
        applies = axis.applies_to(labels)
        labels[name] = part.get(name, next(iter(axis.values)) if applies else ABSENT)
        if applies == (labels[name] == ABSENT):
            applying = "applies" if applies else "does not apply"
            raise ValueError(f"{where}: {part}: {name!r} {applying} here, got {labels[name]!r}")
    return labels


def _resources(content: dict[str, Any]) -> Resources:
    _known(content, RESOURCES, "key of 'resources'")
    resources = Resources(**content)
    for name in ("parallel", "cpu_threads", "timeout_min"):
        number = getattr(resources, name)
        if type(number) is not int or number < 1:
            raise ValueError(f"resources: {name}: expected a positive integer, got {number!r}")
    if resources.gpus not in (0, 1):
        raise ValueError(f"resources: gpus: a run has 0 or 1 GPU, got {resources.gpus!r}")
    _mapping(resources.slurm, "resources: slurm")
    return resources

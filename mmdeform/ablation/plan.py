"""Plans: the config of each row, checked, and what its model costs."""

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from mmengine import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope, init_default_scope

from ..analysis.complexity import (
    complexity,
    config_shape,
    fixed_proposals,
    latency,
    make_inputs,
    peak_bytes,
    proposals_of,
)
from .data import use_coco_data
from .overrides import apply_overrides, canonical, config_hash
from .spec import ABSENT, BY_BASE, CONFIG, Spec, row_name


@dataclass(frozen=True)
class Cost:
    """What the model of a row costs; None was not measured.

    Attributes:
        parameters (int): All of them.
        macs (int): Multiply-adds for one image of the test pipeline's shape.
        latency_ms (float): Median time for that image, on the CPU.
        peak_memory_bytes (int): Beyond the weights.
    """

    parameters: int | None = None
    macs: int | None = None
    latency_ms: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class PlannedRow:
    """A row that can be trained.

    Attributes:
        name (str): Unique.
        labels (dict[str, str]): Value on each axis.
        is_base (bool): Whether the others are compared with it.
        config (Config): Complete, but for the seed.
        hash (str): Of the config.
        cost (Cost): Of its model.
    """

    name: str
    labels: dict[str, str]
    is_base: bool
    config: Config
    hash: str
    cost: Cost = Cost()


def plan_rows(
    spec: Spec,
    base: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> list[PlannedRow]:
    """The rows of a spec with their configs.

    Args:
        spec (Spec): The ablation.
        base (str, optional): Which of its bases; default: the first.
        overrides (Mapping, optional): Of all rows, after those of the spec.

    Raises:
        ValueError: An override is misspelt or changes nothing, two rows are equal, or a config
            cannot be trained by epochs.
    """
    base = next(iter(spec.bases)) if base is None else base
    if base not in spec.bases:
        raise ValueError(f"base: expected one of {', '.join(map(repr, spec.bases))}, got {base!r}")

    @functools.cache
    def start(path: str) -> Config:
        """A config with what all rows have."""
        cfg = _read_config(path)
        if spec.data is not None:
            cfg = use_coco_data(cfg, spec.data)
        for where, common in (("overrides", spec.overrides), ("options", overrides)):
            if common:
                cfg = _apply(cfg, common, where if path == spec.bases[base] else f"{path}: {where}")
        _check_trainable(cfg)
        return cfg

    start(spec.bases[base])  # what is wrong with it is nothing of a row
    rows: dict[str, PlannedRow] = {}
    for labels in spec.combinations:
        name = row_name(labels)
        changes = [
            (f"row {name}: {axis}: {label}", change)
            for axis, label in labels.items()
            if label != ABSENT
            for change in _changes(spec.axes[axis].values[label], base)
        ]
        configs = [change.pop(CONFIG) for _, change in changes if CONFIG in change]
        if len(configs) > 1:
            raise ValueError(f"row {name}: expected one {CONFIG!r}, got {', '.join(configs)}")
        row_cfg = start(*configs or [spec.bases[base]])
        for where, change in changes:
            if change:
                row_cfg = _apply(row_cfg, change, where)
        row = PlannedRow(name, labels, labels == spec.base_row, row_cfg, config_hash(row_cfg))
        for other in rows.values():
            if canonical(other.config) == canonical(row_cfg):
                raise ValueError(f"the rows {other.name} and {name} have the same config")
        rows[name] = row
    return list(rows.values())


def with_costs(
    rows: list[PlannedRow],
    known: Mapping[str, Cost],
    repeats: int = 0,
    on_row: Callable[[str], None] = lambda name: None,
) -> list[PlannedRow]:
    """The rows with what their models cost.

    Args:
        rows (list[PlannedRow]): Of a plan.
        known (Mapping[str, Cost]): Costs that were measured before, by hash of the config.
        repeats (int): Runs to time; 0 measures neither time nor memory.
        on_row (Callable): Told the name of each row before it is built.

    Raises:
        ValueError: A model cannot be built, or does not run.
    """
    costed = []
    for row in rows:
        cost = known.get(row.hash, Cost())
        if cost.macs is None or (repeats and cost.latency_ms is None):
            on_row(row.name)
            try:
                cost = measure(row.config, repeats)
            except Exception as error:  # whatever a model raises
                raise ValueError(f"row {row.name}: {type(error).__name__}: {error}") from error
        costed.append(replace(row, cost=cost))
    return costed


def measure(cfg: Config, repeats: int = 0) -> Cost:
    """Builds the model of a config and measures it; see :func:`with_costs`."""
    with _scope(cfg), torch.random.fork_rng(devices=[]):
        model = MODELS.build(copy.deepcopy(cfg.model))  # some models write into their configs
        model = revert_sync_batchnorm(model)
        model.eval()
        inputs = make_inputs(model, config_shape(cfg))
        proposals = proposals_of(model)
        fixed = fixed_proposals(model, proposals) if proposals else contextlib.nullcontext()
        with fixed:
            total = complexity(model, *inputs.args, **inputs.kwargs).total
            cost = Cost(total.parameters, total.macs)
            if repeats:
                times = latency(model, *inputs.args, repeats=repeats, **inputs.kwargs).times_ms
                peak = peak_bytes(model, *inputs.args, **inputs.kwargs)
                cost = replace(cost, latency_ms=median(times), peak_memory_bytes=peak)
    return cost


def cost_from(values: Mapping[str, Any]) -> Cost:
    """A cost from the values of its fields, others left out."""
    return Cost(**{name: values.get(name) for name in asdict(Cost())})


@contextlib.contextmanager
def _scope(cfg: Config) -> Any:
    """The config's registry scope, and afterwards the one before."""
    before = DefaultScope.get_current_instance()
    init_default_scope(cfg.get("default_scope") or "mmdet")
    try:
        yield
    finally:
        if before is not None:
            init_default_scope(before.scope_name)


def _changes(overrides: Mapping[str, Any], base: str) -> list[dict[str, Any]]:
    """Overrides of a value, and then those that go with a base."""
    changes = dict(overrides)
    return [changes, dict(changes.pop(BY_BASE, {}).get(base) or {})]


def _read_config(path: str) -> Config:
    try:
        if "::" in path:
            cfg = Config.fromstring(f"_base_ = {path!r}", ".py")
        else:
            cfg = Config.fromfile(path)
    except Exception as error:  # whatever the code in a config raises
        raise ValueError(f"base: {path} cannot be read: {error}") from error
    cfg.setdefault("randomness", dict())
    return cfg


def _apply(cfg: Config, overrides: Mapping[str, Any], where: str) -> Config:
    try:
        return apply_overrides(cfg, overrides)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: {error}") from error


def _check_trainable(cfg: Config) -> None:
    schedule = cfg.get("train_cfg") or {}
    if not schedule.get("by_epoch", True) or "max_epochs" not in schedule:
        raise ValueError(
            f"train_cfg: expected epochs (max_epochs), by which runs are resumed and compared, got "
            f"{dict(schedule)}"
        )
    hooks = cfg.get("default_hooks") or {}
    if hooks.get("checkpoint") is None or not hooks["checkpoint"].get("by_epoch", True):
        raise ValueError("default_hooks.checkpoint: expected a checkpoint by epoch, to resume from")

"""The folder of an ablation: its plan, and a folder for each run."""

import copy
import fcntl
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .job import RunFolder, read_json, write_json, write_text
from .plan import Cost, PlannedRow, cost_from
from .results import RowResult
from .spec import Resources, Spec

PLAN = "ablation.json"


class Store:
    """An ablation on disk: ``ablation.json`` and ``ROW/seed_N``.

    Args:
        path (str or Path): The folder.

    Raises:
        ValueError: There is no ablation.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / PLAN).is_file():
            raise ValueError(f"{self.path} is no folder of an ablation: it has no {PLAN}")
        plan = read_json(self.path / PLAN)
        self.name: str = plan["name"]
        self.metrics: tuple[str, ...] = tuple(plan["metrics"])
        self.rows: list[dict[str, Any]] = plan["rows"]
        self.seeds: tuple[int, ...] = tuple(plan["seeds"])
        self.resources = Resources(**plan["resources"])

    @classmethod
    def create(cls, path: str | Path, spec: Spec, rows: list[PlannedRow]) -> "Store":
        """Writes a plan; what was trained of it before stays.

        Args:
            path (str or Path): A new folder, or one that holds this ablation, to which rows and
                seeds may have been added.
            spec (Spec): The ablation.
            rows (list[PlannedRow]): Of the spec.

        Raises:
            ValueError: Rows that are there have another config.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        with open(path / "_lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            runs = [(row, seed, run_folder(path, row.name, seed)) for row in rows
                    for seed in spec.seeds]  # fmt: skip
            changed = {
                row.name
                for row, _, run in runs
                if read_json(run.path / "run.json", dict(hash=row.hash))["hash"] != row.hash
            }
            if changed:
                raise ValueError(
                    f"{path} holds other configs of {', '.join(sorted(changed))}: give the changed "
                    "ablation a new folder"
                )
            for row, seed, run in runs:
                _prepare(run, row, seed, spec.metrics)
            known = known_costs(path)
            write_json(
                path / PLAN,
                dict(
                    name=spec.name,
                    metrics=spec.metrics,
                    seeds=spec.seeds,
                    resources=asdict(spec.resources),
                    rows=[_describe(row, known) for row in rows],
                ),
            )
        return cls(path)

    def runs(self) -> Iterator[tuple[dict[str, Any], int, RunFolder]]:
        """Row, seed and folder of all runs, in the order of the plan, seed by seed."""
        for seed in self.seeds:
            for row in self.rows:
                yield row, seed, run_folder(self.path, row["name"], seed)

    def results(self) -> list[RowResult]:
        """What is known of all runs, in the order of the plan."""
        found = []
        for row, seed, run in self.runs():
            status = run.status()
            curves = read_curves(run)
            validations = run.validations()
            final = validations[max(validations)] if validations else {}
            found.append(
                RowResult(
                    row=row["name"],
                    labels=row["labels"],
                    is_base=row["is_base"],
                    seed=seed,
                    status=status["status"],
                    metrics=final,
                    curves=curves,
                    error=status["error"] if status["status"] == "failed" else None,
                    **asdict(cost_from(row)),
                )
            )
        order = [row["name"] for row in self.rows]
        return sorted(found, key=lambda result: order.index(result.row))

    def retry(self) -> list[str]:
        """Makes failed runs planned ones; returns their names.

        Raises:
            ValueError: The folder of a run was removed.
        """
        for _, _, run in self.runs():
            if not run.config.is_file():
                raise ValueError(f"{run.path} was removed: `run` with the spec makes it anew")
        retried = []
        for row, seed, run in self.runs():
            with run.lock() as lock:
                if lock is not None and run_status(run) == "failed":
                    run.set_status("planned")
                    retried.append(f"{row['name']}/seed_{seed}")
        return retried


def run_folder(path: Path, row: str, seed: int) -> RunFolder:
    return RunFolder(path / row / f"seed_{seed}")


def run_status(run: RunFolder) -> str:
    """What is written, by whoever held the lock last."""
    return read_json(run.path / "status.json", dict(status="planned"))["status"]


def known_costs(path: str | Path) -> dict[str, Cost]:
    """Costs of the rows of a folder, by hash of the config; none where there is no ablation."""
    plan = read_json(Path(path) / PLAN, dict(rows=[]))
    return {row["hash"]: cost_from(row) for row in plan["rows"]}


def read_curves(run: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """Metrics by epoch, and the means of the losses over each epoch."""
    curves: dict[str, dict[int, float]] = {}
    for epoch, record in run.validations().items():
        for name, value in record.items():
            curves.setdefault(name, {})[epoch] = value
    losses: dict[str, dict[int, dict[int, float]]] = {}
    for record in run.scalars():
        if "lr" in record and "epoch" in record:
            for name, value in record.items():
                if "loss" in name and isinstance(value, (int, float)):
                    by_step = losses.setdefault(name, {}).setdefault(record["epoch"], {})
                    by_step[record["step"]] = value  # a step that was trained again counts once
    for name, epochs in losses.items():
        curves[name] = {epoch: sum(s.values()) / len(s) for epoch, s in epochs.items()}
    return {name: sorted(points.items()) for name, points in curves.items()}


def _describe(row: PlannedRow, known: dict[str, Cost]) -> dict[str, Any]:
    """A row for the plan; what was not measured this time may have been before."""
    before = asdict(known.get(row.hash, Cost()))
    cost = {name: before[name] if v is None else v for name, v in asdict(row.cost).items()}
    return dict(name=row.name, labels=row.labels, is_base=row.is_base, hash=row.hash, **cost)


def _prepare(run: RunFolder, row: PlannedRow, seed: int, metrics: tuple[str, ...]) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    if not (run.path / "run.json").exists():  # which is written last
        cfg = copy.deepcopy(row.config)
        cfg.randomness["seed"] = seed
        write_text(run.config, cfg.pretty_text + "\n")
    schedule = row.config.train_cfg
    facts = dict(
        hash=row.hash,
        max_epochs=schedule["max_epochs"],
        val_interval=schedule.get("val_interval", 1),
        val_begin=schedule.get("val_begin", 1),
        metrics=list(metrics),
    )
    if read_json(run.path / "run.json", {}) != facts:
        write_json(run.path / "run.json", facts)

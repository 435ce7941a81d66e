"""Ablations: trains the rows of a table of config overrides, each with several seeds.

    python tools/ablate.py plan configs/_ablations/kernels.yml
    python tools/ablate.py run configs/_ablations/kernels.yml --parallel 2
    python tools/ablate.py run configs/_ablations/kernels.yml --base coco --gpus 1 --slurm
    python tools/ablate.py status work_dirs/ablations/kernels
    python tools/ablate.py retry work_dirs/ablations/kernels
    python tools/ablate.py report work_dirs/ablations/kernels

`plan` checks a spec and prints its rows, with parameters and MACs. `run` trains them with mmdet's
train.py; what was interrupted goes on at its last checkpoint, what is finished is never trained
again, and what failed is left for `retry`. Runs may be stopped in any way, and several of them may
share a folder. `report` writes what there is so far as Markdown, CSV and a page.
How specs are written: docs/ablate.md.
"""

import argparse
import dataclasses
import json
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from mmengine import DictAction
from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import mmdeform  # noqa: F401  (configs may inherit from mmdeform::)
from mmdeform.ablation import (
    PlannedRow,
    RowResult,
    Spec,
    Store,
    known_costs,
    load_spec,
    plan_rows,
    train_runs,
    with_costs,
)
from mmdeform.ablation.report import write_report
from mmdeform.ablation.spec import suggestion

TRAIN = (sys.executable, str(Path(__file__).absolute().with_name("train.py")))


def plan(args: argparse.Namespace) -> tuple[Spec, list[PlannedRow]]:
    """The spec with the options of the command line, and its rows.

    Raises:
        ValueError: Whatever is wrong in it.
    """
    spec = load_spec(args.spec)
    given = dict(parallel=args.parallel, cpu_threads=args.cpu_threads, gpus=args.gpus)
    given = {name: value for name, value in given.items() if value is not None}
    spec = dataclasses.replace(
        spec,
        seeds=tuple(args.seeds or spec.seeds),
        resources=dataclasses.replace(spec.resources, **given),
    )
    if args.data is not None:
        try:
            spec = spec.with_data(yaml.safe_load(args.data.read_text()))
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"--data: {error}") from error
    rows = plan_rows(spec, args.base, args.cfg_options)
    if args.rows:
        names = [row.name for row in rows]
        for name in args.rows:
            if name not in names:
                raise ValueError(
                    f"--rows: unknown row {name!r}{suggestion(name, names)} "
                    f"(known: {', '.join(names)})"
                )
        rows = [row for row in rows if row.name in args.rows]
    if args.work_dir is None:
        args.work_dir = Path("work_dirs", "ablations", spec.name)
        suffix = args.base or (next(iter(spec.bases)) if len(spec.bases) > 1 else "")
        if args.data is not None:
            suffix = args.data.stem
        if suffix:
            args.work_dir = args.work_dir.with_name(f"{spec.name}_{suffix}")
    if not args.no_cost:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            step = progress.add_task("measure", total=None)

            def show(name: str) -> None:
                progress.update(step, description=f"build and measure {name}")

            rows = with_costs(rows, known_costs(args.work_dir), args.latency, show)
    return spec, rows


def plan_table(spec: Spec, rows: list[PlannedRow]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("row", *spec.axes):
        table.add_column(column)
    columns = {
        "parameters (M)": lambda cost: cost.parameters and f"{cost.parameters / 1e6:.3f}",
        "GMACs": lambda cost: cost.macs and f"{cost.macs / 1e9:.3f}",
        "latency (ms)": lambda cost: cost.latency_ms and f"{cost.latency_ms:.1f}",
        "memory (MB)": lambda c: c.peak_memory_bytes and f"{c.peak_memory_bytes / 1e6:.0f}",
    }
    columns = {name: f for name, f in columns.items() if any(f(row.cost) for row in rows)}
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        name = f"{row.name} (base)" if row.is_base else row.name
        table.add_row(name, *row.labels.values(), *(f(row.cost) for f in columns.values()))
    return table


def status_table(store: Store, results: list[RowResult]) -> Table:
    """Of each run its status, its last epoch and the first metric."""
    table = Table(box=None, pad_edge=False)
    for column in ("row", "seed", "status", "epoch", store.metrics[0]):
        table.add_column(column, justify="left" if column in ("row", "status") else "right")
    for result in results:
        epochs = [points[-1][0] for points in result.curves.values()]
        metric = result.metrics.get(store.metrics[0])
        table.add_row(
            result.row,
            str(result.seed),
            result.status,
            str(max(epochs)) if epochs else "",
            "" if metric is None else f"{metric:.4f}",
        )
    return table


def summary(results: list[RowResult]) -> str:
    counts = Counter(result.status for result in results)
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def failures(results: list[RowResult]) -> list[str]:
    """The last line of each failure."""
    return [
        f"{result.row}, seed {result.seed}: {(result.error or '').strip().splitlines()[-1]}"
        for result in results
        if result.status == "failed"
    ]


def train(store: Store, slurm: bool, console: Console) -> int:
    """Trains with a live table; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the first is ignored in the background
        signal.signal(number, signal.default_int_handler)
    runs = train_runs(store, TRAIN, slurm)
    results: list[RowResult] = []
    try:
        with Live(console=Console(stderr=True), transient=True, auto_refresh=False) as live:
            for results in runs:
                line = Text(f"{store.path}: {summary(results)}")
                live.update(Group(status_table(store, results), line), refresh=True)
    except KeyboardInterrupt:
        runs.close()
        console.print(
            f"stopped{'; jobs on Slurm go on' if slurm else ''}. The same command goes on with "
            f"{store.path}",
            soft_wrap=True,
        )
        return 130
    show(store, results, console)
    return 1 if failures(results) else 0


def show(store: Store, results: list[RowResult], console: Console) -> None:
    console.print(status_table(store, results))
    console.print(summary(results), highlight=False)
    for line in failures(results):
        console.print(line, soft_wrap=True, highlight=False, markup=False, style="red")
    if failures(results):
        console.print(
            f"logs: {store.path}/ROW/seed_N/log.txt; to train them again: "
            f"python tools/ablate.py retry {store.path}",
            soft_wrap=True,
            highlight=False,
        )


def parse_args(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    planned = argparse.ArgumentParser(add_help=False)
    planned.add_argument("spec", type=Path, help="YAML or Python file")
    planned.add_argument("--base", help="which base config (default: the first of the spec)")
    planned.add_argument(
        "--data", type=Path, help="YAML file with a data set in COCO format, in place of the base's"
    )
    planned.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="for all rows"
    )
    planned.add_argument("--rows", nargs="+", metavar="ROW", help="default: all of the spec")
    planned.add_argument("--seeds", type=int, nargs="+", help="default: those of the spec")
    planned.add_argument("--parallel", type=int, help="runs at a time")
    planned.add_argument("--cpu-threads", type=int, help="of each run")
    planned.add_argument("--gpus", type=int, choices=(0, 1), help="of each run")
    planned.add_argument(
        "--no-cost", action="store_true", help="build no models: neither parameters nor MACs"
    )
    planned.add_argument(
        "--latency", type=int, default=0, metavar="N", help="time N images, and measure memory"
    )
    planned.add_argument(
        "--work-dir", type=Path, help="default: work_dirs/ablations/NAME[_BASE or _DATA]"
    )
    commands.add_parser("plan", parents=[planned], help="check a spec and print its rows")
    run = commands.add_parser("run", parents=[planned], help="train what is not finished")
    status = commands.add_parser("status", help="print what is known of all runs")
    retry = commands.add_parser("retry", help="train what failed again, and what is not finished")
    report = commands.add_parser("report", help="write Markdown, CSV and a page of all runs")
    for command in (status, retry, report):
        command.add_argument("work_dir", type=Path, help="of a run")
    for command in (run, retry):
        command.add_argument("--slurm", action="store_true", help="as jobs of Slurm")
    status.add_argument("--out", type=Path, help="JSON file for metrics, curves and costs")
    report.add_argument("--out", type=Path, help="folder to write to; default: WORK_DIR/report")
    report.add_argument("--metrics", nargs="+", help="columns; default: those of the spec")
    args = parser.parse_args(argv)
    for name in ("parallel", "cpu_threads"):
        if (number := getattr(args, name, None)) is not None and number < 1:
            parser.error(f"--{name.replace('_', '-')}: expected a positive number, got {number}")
    if getattr(args, "latency", 0) < 0:
        parser.error(f"--latency: expected a number of runs, got {args.latency}")
    seeds = getattr(args, "seeds", None) or []
    if len(set(seeds)) < len(seeds):
        parser.error(f"--seeds: expected different ones, got {seeds}")
    return parser, args


def main(argv: list[str] | None = None) -> int:
    parser, args = parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # in files and pipes as wide as the tables need
    try:
        if args.command in ("plan", "run"):
            spec, rows = plan(args)
            console.print(plan_table(spec, rows))
            runs = (
                f"{len(rows)} rows with {len(spec.seeds)} seeds: {len(rows) * len(spec.seeds)} runs"
            )
            console.print(f"{runs}, in {args.work_dir}", soft_wrap=True, highlight=False)
            if args.command == "plan":
                return 0
            return train(Store.create(args.work_dir, spec, rows), args.slurm, console)
        store = Store(args.work_dir)
        if args.command == "retry":
            retried = store.retry()
            console.print(f"to be trained again: {', '.join(retried) or 'none'}", highlight=False)
            return train(store, args.slurm, console)
        results = store.results()
        if args.command == "report":
            out = args.out or args.work_dir / "report"
            metrics = args.metrics or store.metrics or None
            for path in write_report(results, out, title=store.name, metrics=metrics):
                console.print(f"written: {path}", soft_wrap=True, highlight=False)
            return 0
        show(store, results, console)
        if args.out is not None:
            write_results(args.out, store, results)
            console.print(f"written to {args.out}", soft_wrap=True, highlight=False)
        return 0
    except ValueError as error:
        parser.error(str(error))


def write_results(path: Path, store: Store, results: list[RowResult]) -> None:
    content: dict[str, Any] = dict(ablation=store.name, metrics=list(store.metrics))
    content["runs"] = [dataclasses.asdict(result) for result in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

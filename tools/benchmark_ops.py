"""Measure the operators beside every other implementation that is installed.

    python tools/benchmark_ops.py --device cpu --threads 2
    python tools/benchmark_ops.py --device cuda --dtype fp32 fp16 bf16 --json results.json
    python tools/benchmark_ops.py --op deform_conv2d --filter v2-c4 --peers mmcv F.conv2d

Each case is first compared with the reference in fp64 on the measured data. An operator that is
wrong gets no speed, and the exit code is 1. See docs/benchmarks.md.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmdeform.analysis import benchmark
from mmdeform.analysis.benchmark import CaseResult, Row

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}
FORMAT = 1  # of the JSON file
WIDTH = 120  # of tables in a file or pipe
COLUMNS = ("", "forward ms (min)", "x", "MiB", "fwd + bwd ms (min)", "x", "MiB", "error")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    peers = {peer.name: None for op in benchmark.OPERATORS.values() for peer in op.peers}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="+", choices=list(benchmark.OPERATORS), help="default: all")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", nargs="+", default=["fp32"], choices=list(DTYPES))
    parser.add_argument("--batch", nargs="+", type=int, default=[], help="default: as the case")
    parser.add_argument(
        "--filter", nargs="+", default=[], metavar="TEXT", help="cases whose name contains TEXT"
    )
    parser.add_argument("--sweep", action="store_true", help="all cases, not only the usual ones")
    parser.add_argument("--peers", nargs="*", choices=list(peers), help="default: all")
    parser.add_argument("--threads", type=int, help="of the CPU; default: as torch chooses")
    parser.add_argument("--repeats", type=int, default=7, help="samples per time (default: 7)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tf32", action="store_true", help="allow TF32 on the GPU, for everyone")
    parser.add_argument(
        "--deterministic", action="store_true", help="measure the deterministic variants"
    )
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    args = parser.parse_args(argv)
    if args.repeats < 1 or any(batch < 1 for batch in args.batch):
        parser.error("--repeats and --batch: expected numbers of at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch finds no GPU")
    return args


def configure(args: argparse.Namespace) -> None:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    torch.backends.cudnn.benchmark = True  # the yardstick at its best
    if args.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False


def error_text(result: CaseResult, row: Row) -> Text:
    if row.error is None:
        return Text("not compared", style="dim")
    name, error = max(row.error.items(), key=lambda item: item[1].worst)
    if row.exact:
        return Text(f"{error.worst:.0e}")
    return Text(f"{error.worst:.0e} ({name})", style="bold red")


def time_cells(result: CaseResult, row: Row, mode: str) -> list[Text]:
    timing, relative = getattr(row, mode), result.relative(row, mode)
    memory = timing.extra_bytes
    if row is result.rows[0]:
        ratio = Text("1")
    elif relative >= 1:
        ratio = Text(f"{relative:.2f}", style="green")
    elif row.kind == "yardstick":
        ratio = Text(f"{relative:.2f}", style="yellow")
    else:
        ratio = Text(f"{relative:.2f} faster", style="bold red")
    return [
        Text(f"{timing.median_ms:.4g} ({timing.min_ms:.4g})"),
        ratio,
        Text("?" if memory is None else f"{memory / 2**20:.1f}"),
    ]


def title(result: CaseResult) -> str:
    return (
        f"{result.operator}  {result.case}  batch {result.batch}  {result.dtype}  {result.device}"
    )


def table_rows(result: CaseResult) -> list[list[Text]]:
    """The cells of one case, implementations down, both directions across."""
    rows = []
    for row in result.rows:
        name = row.name
        if row.dtype != result.dtype:
            name += f" ({row.dtype})"
        if row.kind == "reference":
            name += " (no kernel)"
        forward, both = (time_cells(result, row, mode) for mode in ("forward", "forward_backward"))
        rows.append([Text(name), *forward, *both, error_text(result, row)])
    return rows


def make_table(result: CaseResult) -> Table:
    """One case as a table for the terminal."""
    table = Table(
        title=title(result), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    for index, column in enumerate(COLUMNS):
        justify = "right" if 0 < index < len(COLUMNS) - 1 else "left"
        table.add_column(column, justify=justify, no_wrap=True)
    for cells in table_rows(result):
        table.add_row(*cells)
    return table


def make_markdown(results: list[CaseResult]) -> str:
    """All cases as tables for docs/benchmarks.md."""
    parts = []
    for result in results:
        lines = [f"**{title(result)}**", ""]
        if result.refused is not None:
            lines.append(f"Refused: {result.refused}")
        else:
            lines.append(f"| {' | '.join(COLUMNS)} |")
            lines.append("|---|" + "---:|" * (len(COLUMNS) - 2) + "---|")
            for cells in table_rows(result):
                lines.append(f"| {' | '.join(cell.plain for cell in cells)} |")
            absent = "; ".join(f"{peer}: {reason}" for peer, reason in result.absent.items())
            lines += ["", f"Absent: {absent}"] if absent else []
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def show(console: Console, result: CaseResult) -> None:
    if result.refused is not None:
        console.print(Text(f"REFUSED  {title(result)}: {result.refused}", style="bold red"))
        return
    console.print(make_table(result))
    for peer, reason in result.absent.items():
        console.print(Text(f"  absent: {peer}: {reason}", style="dim"))


def show_environment(console: Console, environment: dict) -> None:
    hardware = environment["cuda"]["gpu"] if environment["cuda"] else environment["cpu"]
    console.print(
        f"torch {environment['torch']}, {hardware}, {environment['threads']} threads, "
        f"CPU library {environment['libraries']['cpu']}, commit {environment['commit']}",
        highlight=False,
    )
    console.print(
        "x: median time relative to mmdeform's (above 1: mmdeform is faster); MiB: peak memory "
        "above inputs and results; error: largest difference to fp64, red if beyond the tolerance",
        style="dim",
        highlight=False,
    )
    load, cores = environment["load"], environment["cores"]
    if load is not None and load > 0.5 * cores:
        console.print(
            f"This machine is busy (load {load:.1f} on {cores} cores): compare ratios, not times.",
            style="yellow",
        )


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    operators = [benchmark.OPERATORS[name] for name in args.op or benchmark.OPERATORS]
    runs = list(benchmark.select(operators, args.device, args.filter, args.batch, args.sweep))
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    if not runs:
        print("benchmark_ops.py: no case fits; see --list --sweep", file=sys.stderr)
        return 2
    if args.list:
        for operator, case, batch in runs:
            print(f"{operator.name}/{case.name} batch {batch}")
        return 0
    configure(args)
    environment = benchmark.describe(torch.device(args.device))
    show_environment(console, environment)
    results = []
    for dtype in args.dtype:
        settings = benchmark.Settings(
            torch.device(args.device), DTYPES[dtype], args.repeats, args.peers, args.seed
        )
        for operator, case, batch in runs:
            with console.status(f"{operator.name} {case.name} batch {batch} {dtype}"):
                results.append(benchmark.run_case(operator, case, batch, settings))
            show(console, results[-1])
    for path in filter(None, (args.json, args.markdown)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if args.markdown is not None:
        args.markdown.write_text(make_markdown(results))
    if args.json is not None:
        report = {
            "format": FORMAT,
            "environment": environment,
            "results": [result.to_json() for result in results],
        }
        args.json.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return 1 if any(result.refused is not None for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())

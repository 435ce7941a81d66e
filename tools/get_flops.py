"""FLOPs, parameters and, if asked for, latency and peak memory of the model of a config.

    python tools/get_flops.py CONFIG
    python tools/get_flops.py CONFIG CHECKPOINT --shape 800 1333 --latency 20 --device cuda

Writes a table, a picture and a JSON file. One image of noise goes through the model. FLOPs count a
multiply-add as two, MACs as one. Unlike with mmdet's tool of the same name deformable operators are
counted, mmdeform's and mmcv's; what else ran and could not be counted is named.

RoI heads of two-stage detectors get --proposals boxes, however many untrained weights would leave
after NMS. With --mode predict everything runs as in a test, up to the detections.

--device meta counts FLOPs without computing anything, of models that never look at values: of
one-stage detectors, backbones and classifiers with operators of torch and mmdeform.
"""

import argparse
import contextlib
import json
import pickle
import traceback
from pathlib import Path
from typing import Any

import matplotlib
import torch
from mmengine import Config, DictAction
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

import mmdeform  # noqa: F401  (configs may inherit from mmdeform::)
from mmdeform.analysis.benchmark.environment import describe
from mmdeform.analysis.complexity import (
    KINDS,
    Complexity,
    Part,
    complexity,
    config_shape,
    count_rois,
    fixed_proposals,
    latency,
    make_inputs,
    peak_bytes,
    proposals_of,
    weight_bytes,
)

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the backend is chosen

COLORS = dict(zip(KINDS, ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#F0E442"), strict=True))
DPI = 200


def build_model(
    config: Path, options: dict | None, checkpoint: Path | None
) -> tuple[Config, nn.Module]:
    """The config and its model, in evaluation mode.

    Raises:
        ValueError: There is no model, it cannot be built, or the checkpoint lacks weights of it.
    """
    try:
        cfg = Config.fromfile(config)
        cfg.merge_from_dict(options or {})
    except Exception as error:  # whatever the code in a config raises
        raise ValueError(f"{config} cannot be read: {_brief(error)}") from error
    if cfg.get("model") is None:
        raise ValueError(f"{config} has no model")
    init_default_scope(cfg.get("default_scope") or "mmdet")
    try:
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
    except Exception as error:
        raise ValueError(f"{config}: its model cannot be built: {_brief(error)}") from error
    if checkpoint is not None:
        load(model, checkpoint)
    model.eval()  # returns nothing in mmdet's backbones
    return cfg, model


def load(model: nn.Module, path: Path) -> None:
    """Loads a checkpoint that has all weights of the model.

    Raises:
        ValueError: It has not.
    """
    try:
        checkpoint = CheckpointLoader.load_checkpoint(str(path), "cpu", logger="silent")
        result = model.load_state_dict(checkpoint.get("state_dict", checkpoint), strict=False)
    except (RuntimeError, pickle.UnpicklingError, AttributeError, TypeError, EOFError) as error:
        raise ValueError(f"{path} is no checkpoint of the model: {_brief(error)}") from error
    if result.missing_keys:
        raise ValueError(
            f"{path} lacks {len(result.missing_keys)} weights of the model, "
            f"{result.missing_keys[0]} first"
        )


def _brief(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip().splitlines()[0]


def examine(args: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], Complexity]:
    """Counts and measures; returns everything for the JSON file, and the count."""
    device = torch.device(args.device)
    step = progress.add_task("build the model", total=None)
    cfg, model = build_model(args.config, args.cfg_options, args.checkpoint)
    shape = tuple(args.shape) if args.shape else config_shape(cfg)
    model.to(device)
    proposals = args.proposals or proposals_of(model)
    if args.mode == "predict":
        if args.proposals:
            raise ValueError("--proposals: in mode predict the RPN decides on the proposals")
        proposals = None
    fixed = fixed_proposals(model, proposals) if proposals else contextlib.nullcontext()
    inputs = make_inputs(model, shape, device, args.mode)
    report: dict[str, Any] = dict(
        config=str(args.config),
        checkpoint=None if args.checkpoint is None else str(args.checkpoint),
        model=type(model).__name__,
        mode=args.mode,
        device=args.device,
        image_shape=list(inputs.image_shape),
        network_input_shape=list(inputs.network_shape),
        proposals=proposals,
    )
    with fixed:
        progress.update(step, description="count")
        try:
            with count_rois(model) as rois:
                result = complexity(model, *inputs.args, **inputs.kwargs)
        except Exception as error:  # whatever a model raises for an image that it does not like
            advice = "; meta is for models that never look at values" * (device.type == "meta")
            raise ValueError(
                f"{type(model).__name__} does not run on {args.device} in mode {args.mode} with "
                f"an image of {shape[0]} x {shape[1]}: {_brief(error)}{advice}"
            ) from error
        report |= count_report(result) | dict(rois=rois)
        if args.latency:
            progress.update(step, description=f"time {args.latency} runs")
            times = latency(
                model, *inputs.args, repeats=args.latency, device=device, **inputs.kwargs
            )
            progress.update(step, description="measure memory")
            first, median, third = times.quartiles_ms
            report["latency_ms"] = dict(
                median=median, first_quartile=first, third_quartile=third, runs=times.times_ms
            )
            report["peak_bytes_beyond_weights"] = peak_bytes(
                model, *inputs.args, device=device, **inputs.kwargs
            )
            report["weight_bytes"] = weight_bytes(model)
    return report | dict(environment=describe(device)), result


def count_report(result: Complexity) -> dict[str, Any]:
    """What was counted, ready for JSON."""

    def operators(by_operator: dict[str, int]) -> dict[str, Any]:
        return {name: dict(flops=n, macs=n // 2) for name, n in by_operator.items()}

    def part_report(part: Part) -> dict[str, Any]:
        return dict(
            name=part.name,
            type=part.type,
            flops=part.flops,
            macs=part.macs,
            parameters=part.parameters,
            by_operator=operators(part.by_operator),
        )

    return dict(
        flops=result.total.flops,
        macs=result.total.macs,
        parameters=result.total.parameters,
        trainable_parameters=result.trainable_parameters,
        by_kind=operators(result.total.by_kind()),
        by_operator=operators(result.total.by_operator),
        modules=[part_report(part) for part in result.modules],
        deformable_layers=[part_report(part) for part in result.deformable_layers()],
        calls_not_counted=result.missing(),
        calls_of_elementary_operators_not_counted={
            name: calls
            for name, calls in result.not_counted.items()
            if name not in result.missing()
        },
    )


def tables(result: Complexity, depth: int) -> list[Table]:
    """Parts down to a depth, and operators."""
    total = max(result.total.flops, 1)
    parts = Table(box=None, pad_edge=False)
    for column in ("part", "type"):
        parts.add_column(column)
    for column in ("GMACs", "share", "deformable", "parameters (M)"):
        parts.add_column(column, justify="right")
    for part in (result.total, *result.parts(depth)):
        indent = "  " * max(part.depth - 1, 0)
        parts.add_row(
            indent + part.name.rpartition(".")[2] if part.name else "total",
            part.type,
            f"{part.macs / 1e9:.4f}",
            f"{part.flops / total:.1%}",
            f"{part.by_kind()['deformable'] / 2e9:.4f}",
            f"{part.parameters / 1e6:.3f}",
        )
    operators = Table(box=None, pad_edge=False)
    operators.add_column("operator")
    operators.add_column("GMACs", justify="right")
    operators.add_column("share", justify="right")
    for name, flops in sorted(result.total.by_operator.items(), key=lambda item: -item[1]):
        operators.add_row(name, f"{flops / 2e9:.4f}", f"{flops / total:.1%}")
    return [parts, operators]


def make_figure(result: Complexity, title: str, depth: int) -> plt.Figure:
    """A bar for each part, stacked by kind of operator."""
    parts = [part for part in result.disjoint_parts(depth) if part.flops]
    figure, axis = plt.subplots(figsize=(8, 1.3 + 0.3 * len(parts)), layout="constrained")
    names = [part.name or "model" for part in parts]
    left = [0.0] * len(parts)
    for kind, color in COLORS.items():
        widths = [part.by_kind()[kind] / 2e9 for part in parts]
        if any(widths):
            axis.barh(names, widths, left=left, color=color, label=kind, height=0.7)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, part in enumerate(parts):
        share = part.flops / result.total.flops
        axis.annotate(
            f"{share:.1%}", (left[row], row), (4, 0), textcoords="offset points", va="center",
            fontsize=8, color="0.3",
        )  # fmt: skip
    axis.invert_yaxis()
    axis.margins(y=0.02)
    axis.set_xlim(0, 1.12 * max(left, default=1))
    axis.set_xlabel("GMACs (1 multiply-add = 1 MAC = 2 FLOPs)")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    return figure


def headline(report: dict[str, Any]) -> tuple[str, str]:
    """Of what something was counted, and how much, in words."""
    height, width = report["image_shape"]
    text = f"{report['model']}, image of {height} x {width}"
    if report["network_input_shape"] != report["image_shape"]:
        text += " (padded to {} x {})".format(*report["network_input_shape"])
    return text, (
        f"{report['macs'] / 1e9:.2f} GMACs = {report['flops'] / 1e9:.2f} GFLOPs, "
        f"{report['parameters'] / 1e6:.2f} M parameters"
    )


def notes(report: dict[str, Any]) -> list[str]:
    """What a reader of the figures has to know."""
    lines = []
    if report["trainable_parameters"] != report["parameters"]:
        lines.append(f"trainable: {report['trainable_parameters'] / 1e6:.2f} M parameters")
    counts = ", ".join(f"{count} in {name}" for name, count in report["rois"].items())
    if report["proposals"] is not None:
        lines.append(f"boxes given to the RoI heads: {report['proposals']}")
    if counts:
        lines.append(f"features pooled for RoIs: {counts}")
    if report["calls_not_counted"]:
        calls = ", ".join(
            f"{name} ({count} calls)" for name, count in report["calls_not_counted"].items()
        )
        lines.append(f"not counted, no formula: {calls}")
    lines.append("not counted, as usual: norms, activations, softmax, sums, interpolation")
    if "latency_ms" in report:
        times, peak = report["latency_ms"], report["peak_bytes_beyond_weights"]
        where = report["device"]
        if where == "cpu":
            where += f", threads: {torch.get_num_threads()}"
        lines.append(
            f"latency ({where}): {times['median']:.1f} ms (quartiles "
            f"{times['first_quartile']:.1f} and {times['third_quartile']:.1f}, "
            f"{len(times['runs'])} runs, batch 1)"
        )
        memory = "unknown here" if peak is None else f"{peak / 1e6:.0f} MB"
        lines.append(
            f"memory: {memory} at the peak, beyond {report['weight_bytes'] / 1e6:.0f} MB of weights"
        )
        if report["checkpoint"] is None:
            lines.append("no checkpoint: weights are as they are before training")
    return lines


def parse_args(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="default: new weights")
    parser.add_argument(
        "--shape", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"),
        help="of the image, pixels (default: of the test pipeline)",
    )  # fmt: skip
    parser.add_argument("--mode", choices=("tensor", "predict"), default="tensor",
                        help="the network alone (default), or with what follows it")  # fmt: skip
    parser.add_argument(
        "--proposals", type=int, help="boxes for RoI heads (default: the RPN's max_per_img)"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, meta")
    parser.add_argument(
        "--latency", type=int, metavar="N", help="also time N runs, and measure memory"
    )
    parser.add_argument("--depth", type=int, default=2, help="of the parts shown (default: 2)")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE")
    parser.add_argument(
        "--out", type=Path, default=Path("flops.json"),
        help="JSON file; the picture lies beside it (default: flops.json and flops.png)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    for path in (args.config, args.checkpoint):
        if path is not None and not path.is_file():
            parser.error(f"{path} does not exist")
    numbers = dict(latency=args.latency, depth=args.depth, proposals=args.proposals)
    numbers |= dict(shape=min(args.shape)) if args.shape else {}
    for name, number in numbers.items():
        if number is not None and number < 1:
            parser.error(f"--{name}: expected a positive number, got {number}")
    if args.out.suffix != ".json":
        parser.error(f"--out: expected a name that ends in .json, got {args.out}")
    try:
        kind = torch.device(args.device).type
    except RuntimeError:
        parser.error(f"--device: expected cpu, cuda, cuda:N or meta, got {args.device}")
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: no GPU that this torch could use")
    if kind == "meta" and args.latency:
        parser.error("--latency: nothing is computed on the device meta; take another one")
    return parser, args


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            report, result = examine(args, progress)
    except ValueError as error:
        parser.error(str(error))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    picture = args.out.with_suffix(".png")
    subject, amount = headline(report)
    title = "\n".join((args.config.stem, subject, amount))
    figure = make_figure(result, title, args.depth)
    figure.savefig(picture, dpi=DPI)
    plt.close(figure)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # in files and pipes as wide as the tables need
    console.print(f"{subject}: {amount}", soft_wrap=True, highlight=False)
    for table in tables(result, args.depth):
        console.print(table)
    for line in notes(report):
        console.print(line, soft_wrap=True, highlight=False)
    console.print(f"written to {args.out} and {picture}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()

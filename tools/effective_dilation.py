"""Measure how far apart deformable convolutions sample, by the size of what they look at.

    python tools/effective_dilation.py CONFIG CHECKPOINT --images 100 --out dilation.png

The effective dilation of a filter is the mean distance of its adjacent sampling locations: the
dilation where nothing has moved. As in table 2 of "Deformable Convolutional Networks" filters are
classed by the annotated box in which their centre lies: small, medium, large, or background. Means
and standard deviations over all filters of a data set, for each layer, are printed, drawn and
written beside the picture as JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from mmengine import DictAction
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from mmdeform.analysis.detectors import build_dataset, load_detector
from mmdeform.analysis.dilation import CLASSES, COCO_SIZES, LayerDilation, measure_dilation

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the backend is chosen

COLORS = dict(zip(CLASSES, ("#56B4E9", "#E69F00", "#D55E00", "0.6"), strict=True))


def as_json(layer: LayerDilation) -> dict[str, Any]:
    """Numbers of a layer; None where there was no filter."""

    def by_class(values: np.ndarray) -> dict[str, float | None]:
        return {
            name: None if np.isnan(value) else float(value)
            for name, value in zip(CLASSES, values, strict=True)
        }

    return dict(
        layer=layer.name,
        regular=layer.regular,
        image_pixels_per_map_pixel=layer.stride,
        filters={name: int(n) for name, n in zip(CLASSES, layer.count.sum(0), strict=True)},
        mean=by_class(layer.mean()),
        std=by_class(layer.std()),
        mean_of_groups=[by_class(layer.mean(group)) for group in range(len(layer.count))],
    )


def table_of(layers: list[LayerDilation]) -> Table:
    table = Table(Column("layer", no_wrap=True), "regular", *CLASSES, "stride", box=None)
    for layer in layers:
        cells = [
            f"{mean:.2f}±{std:.2f}" if count else "-"
            for mean, std, count in zip(layer.mean(), layer.std(), layer.count.sum(0), strict=True)
        ]
        table.add_row(layer.name, f"{layer.regular:.3g}", *cells, f"{layer.stride:.3g}")
    return table


def draw(layers: list[LayerDilation]) -> plt.Figure:
    """Means as dots, standard deviations as bars, the dilation without offsets as dashes."""
    figure, axis = plt.subplots(
        figsize=(max(6.0, 0.75 * len(layers) + 1.5), 4), layout="constrained"
    )
    places = np.arange(len(layers))
    for index, name in enumerate(CLASSES):
        shift = (index - (len(CLASSES) - 1) / 2) * 0.17
        axis.errorbar(
            places + shift,
            [layer.mean()[index] for layer in layers],
            [layer.std()[index] for layer in layers],
            fmt="o", color=COLORS[name], label=name, markersize=5, elinewidth=1.4,
        )  # fmt: skip
    axis.hlines(
        [layer.regular for layer in layers], places - 0.42, places + 0.42,
        colors="black", linestyles="dashed", linewidth=1, label="without offsets",
    )  # fmt: skip
    axis.set_xticks(places, [layer.name for layer in layers], rotation=30, ha="right", fontsize=8)
    axis.set(ylabel="effective dilation, map pixels", ylim=(0, None))
    axis.grid(axis="y", color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    return figure


def run(args: argparse.Namespace) -> list[LayerDilation]:
    """Measures, draws and writes; see the top of this file and ``--help``."""
    model = load_detector(args.config, args.checkpoint, args.device, args.cfg_options)
    dataset = build_dataset(model.cfg, args.split)
    found: dict[str, LayerDilation] = {}
    with Progress(console=Console(stderr=True)) as progress:
        total = len(dataset) if args.images is None else min(args.images, len(dataset))
        task = progress.add_task("images", total=total)
        for seen, found in measure_dilation(  # noqa: B007
            model, dataset, args.images, args.layers, args.sizes
        ):
            progress.update(task, completed=seen)
    layers = list(found.values())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure = draw(layers)
    figure.savefig(args.out, dpi=150)
    plt.close(figure)
    report = dict(
        config=str(args.config),
        checkpoint=str(args.checkpoint),
        split=args.split,
        images=seen,
        unit="pixels of the sampled map",
        sizes=dict(
            unit="square root of the area of the annotated box, pixels of the image",
            medium_from=args.sizes[0],
            large_from=args.sizes[1],
        ),
        layers=[as_json(layer) for layer in layers],
    )
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    return layers


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure the effective dilation of deformable convolutions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--out", type=Path, default=Path("dilation.png"),
        help="picture to write; the numbers go to a .json beside it",
    )  # fmt: skip
    parser.add_argument("--split", choices=("train", "val", "test"), default="val")
    parser.add_argument("--images", type=int, help="number of images; default: all of the split")
    parser.add_argument(
        "--layers", nargs="+", default=["**"], metavar="PATTERN", help="names of layers"
    )
    parser.add_argument(
        "--sizes", type=float, nargs=2, default=COCO_SIZES, metavar=("MEDIUM", "LARGE"),
        help="square roots of the areas from which on objects are medium and large, pixels",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="as in train.py")
    args = parser.parse_args()
    for path in (args.config, args.checkpoint):
        if not path.is_file():
            parser.error(f"{path} does not exist")
    try:
        layers = run(args)
    except ValueError as error:
        parser.error(str(error))
    # Narrow terminals break lines; numbers are not cut off.
    Console(width=max(100, Console().width)).print(table_of(layers))
    print(f"written to {args.out} and {args.out.with_suffix('.json')}")


if __name__ == "__main__":
    main()

"""Measure how far deformable convolutions spread their samples on small and on large objects.

    python tools/effective_dilation.py CONFIG CHECKPOINT --out dilation.png
    python tools/effective_dilation.py CONFIG CHECKPOINT --layers "backbone.layer4.**" --split test

The effective dilation of a filter is the mean distance between its adjacent sampling locations in
pixels of the map that it samples; without offsets it is the dilation. Filters are classed by the
smallest annotated box around their centre: small, medium or large, or background. Mean and standard
deviation are over the filters of all images. Table 2 of "Deformable Convolutional Networks".

Images are spread evenly over the data set and prepared by the test pipeline. Writes a picture to
OUT and all numbers to a JSON file of the same name.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from mmengine import DictAction
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mmdeform  # noqa: F401  (configs may inherit from mmdeform::)
from mmdeform.analysis.detectors import build_dataset, load_detector
from mmdeform.analysis.dilation import CLASSES, EffectiveDilation, LayerDilation, Spread
from mmdeform.analysis.dilation.drawing import draw_dilation, labels_of


def table_of(rows: list[LayerDilation]) -> Table:
    """Layers and classes, as in the paper, with means in pixels of the image at the end."""
    table = Table(title="effective dilation, pixels of the sampled map")
    table.add_column("layer", overflow="fold")
    for name in ("stride", "without\noffsets", *CLASSES, f"in the image\n{' / '.join(CLASSES)}"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, row in zip(labels_of(rows), rows, strict=True):
        table.add_row(
            label,
            f"{sum(row.stride) / 2:.3g}",
            f"{row.regular:.3g}",
            *(cell(row.classes[name], "{0.mean:.2f} ± {0.std:.2f}") for name in CLASSES),
            " / ".join(cell(row.in_image[name], "{0.mean:.1f}") for name in CLASSES),
        )
    return table


def cell(spread: Spread, form: str) -> str:
    return form.format(spread) if spread.count else "-"


def as_json(row: LayerDilation) -> dict[str, Any]:
    """The numbers of a row."""

    def numbers(spreads: dict[str, Spread]) -> dict[str, Any]:
        return {
            name: dict(filters=spread.count, mean=spread.mean, std=spread.std)
            if spread.count
            else dict(filters=0, mean=None, std=None)
            for name, spread in spreads.items()
        }

    return {
        "layer": row.layer,
        "call": row.call,
        "dilation_without_offsets": row.regular,
        "stride_in_image_pixels": row.stride,
        "in_map_pixels": numbers(row.classes),
        "in_image_pixels": numbers(row.in_image),
        "in_map_pixels_of_deform_groups": [numbers(group) for group in row.groups],
    }


def measure(args: argparse.Namespace) -> EffectiveDilation:
    """Does what the top of this file says. Returns what it measured."""
    model = load_detector(args.config, args.checkpoint, args.device, args.cfg_options)
    dilation = EffectiveDilation(model, args.layers, tuple(args.sizes))
    dataset = build_dataset(model.cfg, args.split)
    count = min(args.images, len(dataset))
    if not count:
        raise ValueError(f"the data set of {args.split}_dataloader has no images")
    infos = [dataset.get_data_info(i * len(dataset) // count) for i in range(count)]
    for info in track(infos, "measure", console=Console(stderr=True)):
        dilation.add_image(info)
    if not dilation.rows():
        raise ValueError(f"none of {', '.join(dilation.names)} ran in the detector")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw_dilation(dilation.rows()).savefig(args.out, dpi=200)
    report = {
        "config": str(args.config),
        "checkpoint": str(args.checkpoint),
        "split": args.split,
        "images": [Path(info["img_path"]).name for info in infos],
        "size_limits_in_image_pixels": args.sizes,
        "objects": dilation.objects,
        "layers": [as_json(row) for row in dilation.rows()],
    }
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    return dilation


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure the effective dilation of deformable convolutions by size of object.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=Path("dilation.png"), help="picture to write")
    parser.add_argument("--split", choices=("train", "val", "test"), default="val", help="data set")
    parser.add_argument("--images", type=positive, default=100, help="largest number of images")
    parser.add_argument("--layers", nargs="+", default=["**"], help="patterns of names of layers")
    parser.add_argument(
        "--sizes", type=float, nargs=2, default=[32, 96], metavar=("MEDIUM", "LARGE"),
        help="from which side of a square of their area on objects are medium and large, pixels",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="changes of the config")
    args = parser.parse_args()
    for path in (args.config, args.checkpoint):
        if not path.is_file():
            parser.error(f"{path} does not exist")
    if args.out.suffix == ".json":
        parser.error(f"--out must name a picture, but got {args.out}")
    try:
        dilation = measure(args)
    except ValueError as error:
        parser.error(str(error))
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table_of(dilation.rows()))
    objects = ", ".join(f"{count} {name}" for name, count in dilation.objects.items())
    print(f"objects: {objects}")
    print(f"{args.out} and {args.out.with_suffix('.json')} written")


if __name__ == "__main__":
    main()

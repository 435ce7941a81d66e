"""Draw what the queries of a DETR attend to in an image: dense attention, deformable, or both.

    python tools/visualize_attention.py CONFIG CHECKPOINT IMAGE --out attention.png
    python tools/visualize_attention.py CONFIG CHECKPOINT IMAGE --query 80 60 --query 20 140
    python tools/visualize_attention.py CONFIG CHECKPOINT IMAGE --compare CONFIG2 CHECKPOINT2

A row for each of the best detections: the object, and what the query that detects it attends to in
the last layer of the decoder. With --query a row for each position (x, y) in the image, and what
the encoder query of its pixel attends to in the last layer of the encoder. Dense attention is drawn
on the pixels of its map. Of deformable attention there are its samples, the larger and brighter the
larger their weight, and a map as well: samples spread over the pixels that they read. With
--compare the same for another detector: for its query that detects the same object best.

Writes the picture to OUT and all numbers to a JSON file of the same name.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from mmengine import DictAction
from rich.console import Console
from rich.progress import Progress

import mmdeform  # noqa: F401  (configs may inherit from mmdeform::)
from mmdeform.analysis.attention import attention_layers
from mmdeform.analysis.attention.panels import draw_rows
from mmdeform.analysis.attention.rows import Subject, detection_rows, position_rows
from mmdeform.analysis.attention.views import view_image
from mmdeform.analysis.detectors import Picture, load_detector, load_picture


def look(config: Path, checkpoint: Path, args: argparse.Namespace) -> tuple[Picture, Subject]:
    """The image, and what a detector sees in it."""
    model = load_detector(config, checkpoint, args.device, args.cfg_options)
    layers = attention_layers(model, ["encoder.**", "decoder.**"])
    picture = load_picture(model, args.image)
    view = view_image(model, picture, layers)
    classes = tuple((model.dataset_meta or {}).get("classes", ()))
    return picture, Subject(type(model).__name__, view, picture.scale, classes)


def visualize(args: argparse.Namespace) -> int:
    """Does what the top of this file says. Returns the number of rows."""
    models = [(args.config, args.checkpoint), *([args.compare] if args.compare else [])]
    subjects: list[Subject] = []
    with Progress(console=Console(stderr=True)) as progress:
        for config, checkpoint in progress.track(models, description="detect"):
            picture, subject = look(config, checkpoint, args)
            subjects.append(subject)
    if len({subject.name for subject in subjects}) < len(subjects):
        subjects = [
            replace(subject, name=f"{subject.name} {number}")
            for number, subject in enumerate(subjects, 1)
        ]
    width, height = picture.size
    for x, y in args.query:
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(
                f"--query must lie in the image, which is {width} pixels wide and {height} high, "
                f"but got {x:g} {y:g}"
            )
    if args.query:
        rows, reports = position_rows(subjects, args.query, args.level, args.head)
    else:
        rows, reports = detection_rows(subjects, args.detections, args.head)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw_rows(picture.pixels, rows).savefig(args.out, dpi=200)
    report = {
        "image": str(args.image),
        "detectors": [
            {"name": subject.name, "config": str(config), "checkpoint": str(checkpoint)}
            for subject, (config, checkpoint) in zip(subjects, models, strict=True)
        ],
        "rows": reports,
    }
    args.out.with_suffix(".json").write_text(json.dumps(report, allow_nan=False) + "\n")
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw what the queries of a DETR attend to in an image.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--out", type=Path, default=Path("attention.png"), help="picture to write")
    parser.add_argument("--detections", type=int, default=3, help="number of rows without --query")
    parser.add_argument(
        "--query", type=float, nargs=2, action="append", default=[], metavar=("X", "Y"),
        help="position in the image, pixels, for the encoder; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--level", type=int, default=0, help="map whose pixels are the queries, from the finest"
    )
    parser.add_argument(
        "--head", type=int, nargs="+", default=[], help="heads to show, from 0; none: their mean"
    )
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("CONFIG", "CHECKPOINT"), help="another detector"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="changes of the config")
    args = parser.parse_args()
    for path in (args.config, args.checkpoint, args.image, *(args.compare or [])):
        if not path.is_file():
            parser.error(f"{path} does not exist")
    if args.detections < 1:
        parser.error(f"--detections must be at least 1, but got {args.detections}")
    try:
        rows = visualize(args)
    except ValueError as error:
        parser.error(str(error))
    print(f"{rows} queries drawn to {args.out}, numbers in {args.out.with_suffix('.json')}")


if __name__ == "__main__":
    main()

"""Draw where the deformable layers of a detector sample.

    python tools/visualize_sampling.py CONFIG CHECKPOINT IMAGE --out sampling.png
    python tools/visualize_sampling.py CONFIG CHECKPOINT  # images of the validation set

A picture for each kind of layers that the detector has: what it finds; then, for detected objects
and the background, or for positions and queries of your choice,

convolution  the points that one output reads through several deformable convolutions in a row
             (9**depth points of 3x3 kernels); the brighter, the larger the product of modulations
roi_pooling  the bins of the RoI of an object, moved by their offsets, as opaque as their masks
attention    the samples of multi-scale deformable attention by level and weight: of a pixel in the
             encoder, of the query of an object in the decoder
keys         the keys of DAT's deformable attention, as large as the attention that they get

With several kinds their names are added to that of the picture: sampling_attention.png. All numbers
behind the pictures go to a JSON file beside them.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import DictAction
from rich.console import Console
from rich.progress import Progress, TaskID

from mmdeform.analysis.detections import Place, background_place, largest_objects, place_of_query
from mmdeform.analysis.detectors import build_dataset, load_detector, load_picture
from mmdeform.analysis.drawing import DetectionsPanel, Look, Row, draw, panels_of, save
from mmdeform.analysis.recording import KINDS
from mmdeform.analysis.scene import Scene, look

Annotated = list[Any]  # boxes


def scenes(args: argparse.Namespace, model: Any, advance: Any) -> Iterator[tuple[Scene, Annotated]]:
    """Images as the detector sees them, and the boxes that are annotated there."""
    layers = args.layers or "**"
    if args.image:
        for path in args.image:
            yield look(model, load_picture(model, path), layers), []
            advance()
        return
    dataset, shown = build_dataset(model.cfg), 0
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        scene = look(model, load_picture(model, info["img_path"]), layers)
        if args.at or args.query or len(largest_objects(scene.detections(args.score), 2)) == 2:
            yield scene, [instance["bbox"] for instance in info["instances"]]
            advance()
            shown += 1
        if shown == args.images:
            return
    if not shown:
        raise ValueError(
            f"{args.checkpoint} detects two objects with a score of {args.score:g} in no image of "
            "the validation set; train it longer, lower --score or give positions --at"
        )


def places_of(
    args: argparse.Namespace, scene: Scene, annotated: Annotated
) -> tuple[list[Place], list[Place]]:
    """What to look at in an image, and what where layers have RoIs or object queries."""
    chosen = [Place(f"({x:g}, {y:g})", (x, y)) for x, y in args.at]
    chosen += [place_of_query(scene.query_boxes, query) for query in args.query]
    if chosen:
        return chosen, chosen
    found = scene.detections(args.score)
    if not found:
        best = max((detection.score for detection in scene.detections()), default=None)
        there = "nothing" if best is None else f"nothing with a score above {best:.3g}"
        raise ValueError(
            f"{args.checkpoint} detects {there} in {scene.picture.path}, and --score is "
            f"{args.score:g}: lower it, or give positions --at"
        )
    objects = [Place.of(detection) for detection in largest_objects(found, args.objects + 1)]
    background = background_place(scene.picture.size, found, annotated)
    return objects[: args.objects] + ([background] if background else []), objects


def visualize(args: argparse.Namespace, progress: Progress, task: TaskID) -> dict[Path, str]:
    """Writes pictures and numbers; see the top of this file and ``--help``.

    Returns:
        Files that were written, and what they show.
    """
    model = load_detector(args.config, args.checkpoint, args.device, args.cfg_options)
    what = Look(bool(args.layers), args.depth, args.group, args.head)
    rows: dict[str, list[Row]] = {}
    for scene, annotated in scenes(args, model, lambda: progress.advance(task)):
        places, objects = places_of(args, scene, annotated)
        for kind in args.kind or scene.kinds:
            overview = DetectionsPanel.of(scene, args.score)
            of_kind = panels_of(kind, scene, places, overview, what, objects)
            rows.setdefault(kind, []).extend(of_kind)
    written = {}
    progress.update(task, description="draw", completed=0, total=len(rows))
    for kind, of_kind in rows.items():
        name = args.out.name if len(rows) == 1 else f"{args.out.stem}_{kind}{args.out.suffix}"
        save(draw(of_kind), args.out.with_name(name))
        layers = dict.fromkeys(layer for row in of_kind for layer in row.layers)
        written[args.out.with_name(name)] = f"{kind}: {', '.join(layers)}"
        progress.advance(task)
    numbers = dict(
        config=str(args.config),
        checkpoint=str(args.checkpoint),
        kinds={kind: [row.numbers() for row in of_kind] for kind, of_kind in rows.items()},
    )
    args.out.with_suffix(".json").write_text(json.dumps(numbers))
    written[args.out.with_suffix(".json")] = "the numbers behind"
    return written


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    add = parser.add_argument
    add("config", type=Path)
    add("checkpoint", type=Path)
    add("image", type=Path, nargs="*", help="default: images of the validation set")
    add("--out", type=Path, default=Path("sampling.png"), help="picture to write")
    add("--kind", nargs="+", choices=KINDS, help="kinds of layers; default: all that there are")
    add(
        "--at", type=float, nargs=2, action="append", default=[], metavar=("X", "Y"),
        help="position in the image, pixels; may be repeated; default: detected objects",
    )  # fmt: skip
    add(
        "--query", type=int, action="append", default=[], metavar="N",
        help="object query of a DETR-like detector, from 0; may be repeated",
    )  # fmt: skip
    add(
        "--layers", nargs="+", metavar="PATTERN",
        help="names of layers, e.g. 'backbone.layer4.**'; default: those that show most",
    )  # fmt: skip
    add("--depth", type=int, help="convolutions to look through; default: 3, or all there are")
    add("--group", type=int, help="group of convolutions (default: 0) or keys (default: all)")
    add("--head", type=int, help="head of attention; default: all")
    add("--score", type=float, default=0.5, help="least score of a detection; default: 0.5")
    add("--objects", type=int, default=2, help="detected objects beside the background; default: 2")
    add("--images", type=int, default=4, help="images of the validation set; default: 4")
    add("--device", default="cpu")
    add("--cfg-options", nargs="+", action=DictAction, help="changes of the config")
    args = parser.parse_intermixed_args()
    for path in (args.config, args.checkpoint, *args.image):
        if not path.is_file():
            parser.error(f"{path} does not exist")
    for name in ("objects", "images"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, but got {getattr(args, name)}")
    return args


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    args = parse_args(parser)
    try:
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("detect", total=len(args.image) or args.images)
            written = visualize(args, progress, task)
    except ValueError as error:
        parser.error(str(error))
    for path, contents in written.items():
        print(f"written: {path} ({contents})")


if __name__ == "__main__":
    main()

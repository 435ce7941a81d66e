"""Show which part of an image, and which samples, a node of a detector depends on.

    python tools/analyze_support.py CONFIG CHECKPOINT IMAGE --detection 0 --out support.png
    python tools/analyze_support.py CONFIG CHECKPOINT IMAGE --at 80 60 --node neck --output 1

Panels, all of one node:

- the image with the node: a cross, or its box;
- erf, the effective receptive field: the gradient of its response with respect to each pixel;
- sampling, the effective sampling (or bin) locations: what the deformable layers before the node
  sample, coloured by the gradient with respect to where they sample it;
- saliency, the error-bounded saliency region: the smallest part of the image found which alone
  gives the same response within an error; the rest has the mean colour meanwhile;
- detr, of a query: the norms of the gradients of its x, y, w, h and c with respect to each pixel.

The node is a pixel of a feature map (--at), a query of a detection transformer (--query), or what a
detection comes from (--detection): the features of its box in a two-stage detector, the embedding
of its query in a detection transformer. Beside the picture there is a JSON file of the same name
with the numbers.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

import mmdeform  # noqa: F401  (configs may inherit from mmdeform::)
from mmdeform.analysis.detectors import load_detector, load_picture
from mmdeform.analysis.support.choosing import (
    Choice,
    choose_detection,
    choose_feature,
    choose_query,
)
from mmdeform.analysis.support.report import KINDS, Options, SupportReport, analyze

DPI = 200


def support(args: argparse.Namespace) -> SupportReport:
    """Analyses the node and writes all files; see the top of this file and ``--help``."""
    model = load_detector(args.config, args.checkpoint, args.device)
    picture = load_picture(model, args.image)
    choice: Choice
    if args.at is not None:
        choice = choose_feature(model, picture, *args.at, args.node, args.output)
    elif args.query is not None:
        choice = choose_query(model, picture, args.query)
    else:
        choice = choose_detection(model, picture, args.detection or 0)
    options = Options(
        args.layers, args.samples, args.projections, args.bound, args.cell, args.steps, args.batch
    )
    with Progress(console=Console(stderr=True)) as bars:

        def progress(kind: str):
            task = bars.add_task(kind, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        report = analyze(picture, choice, args.what, options, progress)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report.draw().savefig(args.out, dpi=DPI)
    files = dict(config=args.config, checkpoint=args.checkpoint, image=args.image)
    numbers = dict(
        {name: str(path) for name, path in files.items()},
        unit="pixels of the image, whose pixel i has its centre at i; gradients per unit of the "
        "normalised image, those of samples per pixel of what the network gets",
        **report.numbers,
    )
    args.out.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    if args.npz:
        args.npz.parent.mkdir(parents=True, exist_ok=True)
        with args.npz.open("wb") as file:
            np.savez_compressed(file, **report.arrays)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Show which part of an image, and which samples, a node of a detector uses.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--out", type=Path, default=Path("support.png"), help="picture to write")
    parser.add_argument("--npz", type=Path, help="file for the maps and samples themselves")
    nodes = parser.add_mutually_exclusive_group()
    nodes.add_argument(
        "--at", type=float, nargs=2, metavar=("X", "Y"), help="position in the image, pixels"
    )
    nodes.add_argument("--detection", type=int, help="a detection, 0 is the best: the default")
    nodes.add_argument("--query", type=int, help="a query of a detection transformer")
    parser.add_argument("--node", default="backbone", help="module whose map has the pixel at --at")
    parser.add_argument(
        "--output", type=int, default=-1, help="which of its maps, from 0; -1: the last"
    )
    parser.add_argument("--what", nargs="+", choices=KINDS, help="default: all that the node has")
    parser.add_argument(
        "--layers", nargs="+", default=["**"], help="patterns of deformable layers for sampling"
    )
    parser.add_argument("--samples", type=int, default=2000, help="samples to draw at most")
    parser.add_argument(
        "--projections", type=int, default=16,
        help="backward passes for erf and sampling: random combinations of the response",
    )  # fmt: skip
    parser.add_argument("--bound", type=float, default=0.1, help="error of the saliency region")
    parser.add_argument(
        "--cell", type=int, help="its cells, pixels of what the network gets; default: a 24th"
    )
    parser.add_argument(
        "--steps", type=int, default=1000, help="images that saliency may send through the network"
    )
    parser.add_argument("--batch", type=int, default=8, help="how many of them at a time")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    for path in (args.config, args.checkpoint, args.image):
        if not path.is_file():
            parser.error(f"{path} does not exist")
    if args.samples < 1:
        parser.error(f"--samples must be at least 1, got {args.samples}")
    try:
        report = support(args)
    except ValueError as error:
        parser.error(str(error))
    print(f"node: {report.numbers['node']['name']}")
    written = [args.out, args.out.with_suffix(".json"), *([args.npz] if args.npz else [])]
    print(f"written: {', '.join(map(str, written))}")


if __name__ == "__main__":
    main()

"""Draw where deformable attention places its keys in an image, and which of them a query sees.

    python tools/visualize_dat.py CONFIG CHECKPOINT IMAGE --stage 3 --query 80 60 --out keys.png
    python tools/visualize_dat.py CONFIG IMAGE --stage 3 4  # weights as they are before training

A panel for each stage and query (x, y in pixels of the image): circles are the keys of all groups,
their area and colour the attention that the query pays to them, averaged over the heads of the
group; the star is the query. Without --query attention is averaged over all queries of the image.
Dots are keys, however little attention they get; with --offsets lines lead there from their
reference points, where they would be without offsets.

CONFIG has mmdeform.DAT as its backbone: in a detector, whose test pipeline then prepares the image
(keys in the padding are left out of the picture), in a classifier, or alone; these two get it in
its own size, or in that of --size, normalised as for ImageNet. CHECKPOINT is anything that DAT
loads: of a detector, a classifier or the backbone alone.
"""

import argparse
import pickle
from pathlib import Path

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn

import mmdeform  # noqa: F401  (configs may inherit from mmdeform::)
from mmdeform.analysis.dat import deformable_blocks, find_block
from mmdeform.analysis.detectors import Picture, load_picture
from mmdeform.analysis.drawing import KeysPanel, keys_panel, new_figure, save
from mmdeform.analysis.recording import KeysCall, record
from mmdeform.models.backbones.dat import load_dat_checkpoint
from mmdeform.registry import MODELS

PANEL = 3.6  # width of one image in the picture, inches
IMAGENET = dict(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))  # RGB


def build_backbone(cfg: Config, checkpoint: Path | None) -> nn.Module:
    """The backbone of a config, with weights of a checkpoint or new ones."""
    model = cfg.get("model")
    if model is None:
        raise ValueError(f"{cfg.filename} has no model")
    backbone = MODELS.build({**(model.get("backbone") or model), "init_cfg": None})
    deformable_blocks(backbone)  # an error before anything is loaded into something else
    if checkpoint:
        report = load_dat_checkpoint(backbone, checkpoint)
        missing = [name for name in report.missing if not name.startswith(("norms.", "cls_"))]
        if missing:
            raise ValueError(
                f"{checkpoint} lacks {len(missing)} weights of the backbone, {missing[0]} first"
            )
    return backbone.eval()


def prepare(cfg: Config, path: Path, size: tuple[int, int] | None = None) -> tuple[Picture, Tensor]:
    """Reads an image and prepares it as the detector of ``cfg`` would, if it has one.

    Args:
        cfg: Config of a detector, or of anything else with the backbone in it.
        path: Image file.
        size: (width, height) to resize to without a detector. Default: None, its own size.

    Returns:
        The image, and what the backbone gets, shape (1, 3, H, W), with padding right and below.
    """
    if is_detector(cfg):
        if size:
            raise ValueError("--size is for backbones alone; the detector has a test pipeline")
        picture = load_picture(cfg, path)
        preprocessor = cfg.model.get("data_preprocessor", dict(type="DetDataPreprocessor"))
        return picture, MODELS.build(preprocessor)(picture.batch, False)["inputs"]
    image = cv2.imread(str(path))
    if image is None:
        raise ValueError(f"{path} is no image that OpenCV can read")
    pixels = image[..., ::-1].copy()
    inputs = cv2.resize(pixels, size) if size else pixels
    inputs = (inputs.astype(np.float32) - IMAGENET["mean"]) / IMAGENET["std"]
    tensor = torch.from_numpy(inputs).float().permute(2, 0, 1)[None]
    height, width = pixels.shape[:2]
    scale = (tensor.shape[3] / width, tensor.shape[2] / height)
    return Picture(path, pixels, dict(inputs=[tensor[0]]), scale), tensor


def is_detector(cfg: Config) -> bool:
    return "backbone" in cfg.model and cfg.get("default_scope") == "mmdet"


def draw(panels: list[list[KeysPanel]]) -> Figure:
    """Draws rows of panels; a single column is laid on its side."""
    if len(panels[0]) == 1:
        panels = [[row[0] for row in panels]]
    fitted = KeysPanel.fitted([panel for row in panels for panel in row], PANEL)
    rows, columns = len(panels), len(panels[0])
    height, width = fitted[0].pixels.shape[:2]
    figure, axes = new_figure(
        [height / width] * rows, columns, extra=0.3 if columns > 1 else 0.5, panel=PANEL
    )
    for axis, panel in zip(axes.flat, fitted, strict=True):
        panel.draw(axis)
    legend = KeysPanel.legend(fitted)
    figure.legend(
        legend.values(),
        legend.keys(),
        loc="outside lower center",
        ncols=len(legend) if columns > 1 else 3,
        fontsize=8,
        frameon=False,
        columnspacing=1.0,
        handletextpad=0.3,
    )
    return figure


def visualize(args: argparse.Namespace) -> list[KeysCall]:
    """Writes the picture; see the top of this file and ``--help``. Returns what it shows."""
    cfg = Config.fromfile(args.config)
    init_default_scope(cfg.get("default_scope", "mmdet"))
    backbone = build_backbone(cfg, args.checkpoint).to(args.device)
    blocks = deformable_blocks(backbone)
    names = [find_block(blocks, stage, args.block) for stage in args.stage]
    picture, inputs = prepare(cfg, args.image, args.size)
    width, height = picture.size
    for x, y in args.query:
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(
                f"--query must lie in the image, which is {width} pixels wide and {height} high, "
                f"but got {x:g} {y:g}"
            )
    with torch.no_grad(), record(backbone, names) as recording:
        backbone(inputs.to(args.device))

    panels = [
        [
            keys_panel(
                picture, recording[name], query, f"stage {stage}, {title(query)}", args.head,
                args.group, args.offsets,
            )
            for query in args.query or [None]
        ]
        for stage, name in zip(args.stage, names, strict=True)
    ]  # fmt: skip
    save(draw(panels), args.out)
    return [recording[name] for name in names]


def title(query: tuple[float, float] | None) -> str:
    return "mean of all queries" if query is None else f"query ({query[0]:g}, {query[1]:g})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw where deformable attention places its keys, sized by attention.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="default: new weights")
    parser.add_argument("image", type=Path)
    parser.add_argument("--out", type=Path, default=Path("keys.png"), help="picture to write")
    parser.add_argument("--stage", type=int, nargs="+", default=[3], help="from 1 to 4")
    parser.add_argument(
        "--block", type=int, default=-1, help="which deformable block of the stage, from 0"
    )
    parser.add_argument(
        "--query", type=float, nargs=2, action="append", default=[], metavar=("X", "Y"),
        help="position in the image, pixels; may be repeated; none: all queries",
    )  # fmt: skip
    parser.add_argument("--head", type=int, help="the head to show, from 0")
    parser.add_argument("--group", type=int, help="the group to show, from 0")
    parser.add_argument("--offsets", action="store_true", help="draw how the keys have moved")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"),
        help="what to resize the image to for a backbone without a detector",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu")
    args = parser.parse_intermixed_args()
    for path in (args.config, args.checkpoint, args.image):
        if path is not None and not path.is_file():
            parser.error(f"{path} does not exist")
    if args.head is not None and args.group is not None:
        parser.error("--head belongs to one group; give one of --head and --group")
    try:
        layers = visualize(args)
    except (ValueError, pickle.UnpicklingError) as error:
        parser.error(str(error))
    if args.checkpoint is None:
        print("no checkpoint: weights are as they are before training")
    for keys in layers:
        groups, rows, columns = keys.locations.shape[1:4]
        heads = keys.layer.num_heads
        print(f"{keys.name}: {groups} groups of {rows * columns} keys, {heads} heads")
    print(f"drawn to {args.out}")


if __name__ == "__main__":
    main()

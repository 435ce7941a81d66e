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
import itertools
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
from mmengine import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn

import mmdeform  # noqa: F401  (configs may inherit from mmdeform::)
from mmdeform.analysis.dat import LayerKeys, deformable_blocks, find_block, record_keys
from mmdeform.models.backbones.dat import load_dat_checkpoint
from mmdeform.registry import MODELS

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the backend is chosen
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap

PANEL = 3.6  # width of one image in the picture, inches of DPI pixels
DPI = 200
LARGEST = 110.0  # area of the circle of the largest attention, square points, if there is room
DOT = 0.015  # area of the dot of a key relative to that
COVERED = 0.3  # share of an image that circles cover at most
ORANGES = LinearSegmentedColormap.from_list("oranges", ["#D55E00", "#E69F00", "#F0E442"])
QUERY = dict(marker="*", s=130, c="#56B4E9", edgecolors="black", linewidths=0.8)
IMAGENET = dict(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))  # RGB


@dataclass(frozen=True)
class Picture:
    """An image and what the backbone gets of it.

    Attributes:
        pixels: The image, shape (H, W, 3), RGB.
        inputs: What the backbone gets, shape (1, 3, Hp, Wp), with padding right and below.
        scale: (x, y) size of the image within ``inputs`` relative to ``pixels``.
    """

    pixels: np.ndarray
    inputs: Tensor
    scale: tuple[float, float]

    def to_inputs(self, points: Any) -> np.ndarray:
        """Pixels (x, y) of the image as pixels of ``inputs``: pixel i reaches from i - 0.5."""
        return (np.asarray(points, float) + 0.5) * self.scale - 0.5

    def from_inputs(self, points: Any) -> np.ndarray:
        return (np.asarray(points, float) + 0.5) / self.scale - 0.5


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


def load_picture(cfg: Config, path: Path, size: tuple[int, int] | None) -> Picture:
    """Reads an image and prepares it as the detector of ``cfg`` would, if it has one.

    Args:
        cfg: Config of a detector, or of anything else with the backbone in it.
        path: Image file.
        size: (width, height) to resize to without a detector. Default: None, its own size.
    """
    image = cv2.imread(str(path))
    if image is None:
        raise ValueError(f"{path} is no image that OpenCV can read")
    pixels = image[..., ::-1]
    if is_detector(cfg):
        if size:
            raise ValueError("--size is for backbones alone; the detector has a test pipeline")
        return Picture(pixels, *detector_inputs(cfg, path))
    height, width = pixels.shape[:2]
    inputs = cv2.resize(pixels, size) if size else pixels
    inputs = (inputs.astype(np.float32) - IMAGENET["mean"]) / IMAGENET["std"]
    tensor = torch.from_numpy(inputs).float().permute(2, 0, 1)[None]
    return Picture(pixels, tensor, (tensor.shape[3] / width, tensor.shape[2] / height))


def detector_inputs(cfg: Config, path: Path) -> tuple[Tensor, tuple[float, float]]:
    """What a detector makes of an image in its tests, and its scale (x, y)."""
    from mmcv.transforms import Compose
    from mmdet.utils import get_test_pipeline_cfg

    data = Compose(get_test_pipeline_cfg(cfg))(dict(img_path=str(path), img_id=0))
    preprocessor = MODELS.build(
        cfg.model.get("data_preprocessor", dict(type="DetDataPreprocessor"))
    )
    batch = dict(inputs=[data["inputs"]], data_samples=[data["data_samples"]])
    scale = data["data_samples"].get("scale_factor", (1.0, 1.0))
    return preprocessor(batch, False)["inputs"], (float(scale[0]), float(scale[1]))


def is_detector(cfg: Config) -> bool:
    return "backbone" in cfg.model and cfg.get("default_scope") == "mmdet"


def weights_of_keys(
    keys: LayerKeys, queries: list[int], head: int | None, group: int | None
) -> tuple[list[int], Tensor]:
    """Groups to draw and the weights of their keys.

    Args:
        keys: Recorded keys.
        queries: Indices of the queries over which weights are averaged.
        head: The one head to take weights from. Default: None, the average over a group.
        group: The one group to draw. Default: None, the group of ``head``, or all.

    Returns:
        Indices of groups, and weights, shape (groups, Ns).
    """
    groups = keys.points.shape[1]
    weights = keys.attention(queries)  # (M, Ns)
    for name, index, count in (("head", head, len(weights)), ("group", group, groups)):
        if index is not None and not 0 <= index < count:
            raise ValueError(
                f"--{name} must be between 0 and {count - 1} in {keys.name}, but got {index}"
            )
    if head is not None:
        return [head * groups // len(weights)], weights[head, None]
    chosen = list(range(groups)) if group is None else [group]
    return chosen, weights.unflatten(0, (groups, -1)).mean(1)[chosen]


@dataclass(frozen=True)
class Panel:
    """Keys of one layer, and what one query, or all, make of them.

    Attributes:
        title: What it shows.
        points: The keys (x, y) in pixels of the image, shape (P, 2).
        references: Where they would be without offsets, shape (P, 2).
        shares: Their attention relative to the largest, shape (P,).
        query: Centre (x, y) of the query, or None.
    """

    title: str
    points: np.ndarray
    references: np.ndarray
    shares: np.ndarray
    query: np.ndarray | None


def make_panel(
    picture: Picture,
    keys: LayerKeys,
    stage: int,
    query: tuple[float, float] | None,
    head: int | None = None,
    group: int | None = None,
) -> Panel:
    """Finds out what a panel shows.

    Args:
        picture: The image.
        keys: What a layer of the stage has made of it.
        stage: For the title.
        query: Position (x, y) in the image; the nearest query is shown. None: all queries whose
            centres are in the image.
        head, group: See :func:`weights_of_keys`.
    """
    if query is None:
        title, centre = "mean of all queries", None
        height, width = picture.pixels.shape[:2]
        queries = keys.queries_within(width * picture.scale[0], height * picture.scale[1])
    else:
        title = f"query ({query[0]:g}, {query[1]:g})"
        queries = [keys.query_at(*picture.to_inputs(query))]
        centre = picture.from_inputs(keys.position_of(queries[0]))
    groups, weights = weights_of_keys(keys, queries, head, group)
    points, references = (
        picture.from_inputs(positions[0, groups].flatten(0, 1).cpu())
        for positions in (keys.points, keys.reference.expand_as(keys.points))
    )
    ratio = float(weights.max() / weights.mean())
    title = f"stage {stage}, {title}, largest = {ratio:.3g} x mean"
    shares = (weights / weights.max()).flatten().cpu().numpy()
    return Panel(title, points, references, shares, centre)


def edge(largest: float) -> dict[str, Any]:
    """Outline of circles, thin enough for small ones."""
    return dict(edgecolors="black", linewidths=min(0.3, 0.02 * largest))


def draw_panel(
    axis: plt.Axes, picture: Picture, panel: Panel, largest: float, offsets: bool
) -> None:
    """Draws the image and the keys, the largest attention as a circle of area ``largest``."""
    height, width = picture.pixels.shape[:2]
    gray = picture.pixels.mean(-1, keepdims=True)
    axis.imshow((0.4 * gray + 0.35 * picture.pixels).astype(np.uint8), interpolation="bicubic")
    if offsets:
        lines = np.stack([panel.references, panel.points], 1)
        axis.add_collection(LineCollection(lines, colors="white", linewidths=0.4, alpha=0.6))
    axis.scatter(*panel.points.T, s=DOT * largest, c="white", linewidths=0)
    order = np.argsort(-panel.shares)  # small circles on top of large ones
    axis.scatter(
        *panel.points[order].T,
        s=largest * panel.shares[order],
        c=panel.shares[order],
        cmap=ORANGES,
        vmin=0,
        vmax=1,
        alpha=0.85,
        **edge(largest),
    )
    if panel.query is not None:
        axis.scatter(*panel.query, **QUERY)
    axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])
    axis.set_title(panel.title, fontsize=8)


def draw_legend(
    figure: plt.Figure, columns: int, largest: float, query: bool, offsets: bool
) -> None:
    """Explains sizes and marks, below the panels, in one line or, for one column, in two."""
    entries = {
        label: plt.scatter([], [], s=largest * share, color=ORANGES(share), **edge(largest))
        for label, share in (("10%", 0.1), ("50%", 0.5), ("100% of the largest attention", 1.0))
    }
    entries["key"] = plt.scatter([], [], s=4, c="0.6", linewidths=0)
    if offsets:
        entries["offset"] = plt.Line2D([], [], color="0.6", linewidth=0.8)
    if query:
        entries["query"] = plt.scatter([], [], **QUERY)
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=len(entries) if columns > 1 else 3,
        fontsize=8,
        frameon=False,
        columnspacing=1.0,
        handletextpad=0.3,
    )


def draw(picture: Picture, panels: list[list[Panel]], offsets: bool) -> plt.Figure:
    """Draws rows of panels; a single column is laid on its side."""
    if len(panels[0]) == 1:
        panels = [[row[0] for row in panels]]
    rows, columns = len(panels), len(panels[0])
    height = PANEL * picture.pixels.shape[0] / picture.pixels.shape[1]
    covered = max(panel.shares.sum() for panel in itertools.chain(*panels))
    largest = min(LARGEST, COVERED * PANEL * height * 72**2 / covered)
    size = (columns * PANEL, rows * (height + 0.25) + (0.3 if columns > 1 else 0.5))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, panel in zip(axes.flat, itertools.chain(*panels), strict=True):
        draw_panel(axis, picture, panel, largest, offsets)
    draw_legend(figure, columns, largest, panels[0][0].query is not None, offsets)
    return figure


def visualize(args: argparse.Namespace) -> list[LayerKeys]:
    """Writes the picture; see the top of this file and ``--help``. Returns what it shows."""
    cfg = Config.fromfile(args.config)
    init_default_scope(cfg.get("default_scope", "mmdet"))
    backbone = build_backbone(cfg, args.checkpoint).to(args.device)
    blocks = deformable_blocks(backbone)
    names = [find_block(blocks, stage, args.block) for stage in args.stage]
    picture = load_picture(cfg, args.image, args.size)
    height, width = picture.pixels.shape[:2]
    for x, y in args.query:
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(
                f"--query must lie in the image, which is {width} pixels wide and {height} high, "
                f"but got {x:g} {y:g}"
            )
    with torch.no_grad(), record_keys(backbone, names) as record:
        backbone(picture.inputs.to(args.device))

    panels = [
        [
            make_panel(picture, record[name], stage, query, args.head, args.group)
            for query in args.query or [None]
        ]
        for stage, name in zip(args.stage, names, strict=True)
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure = draw(picture, panels, args.offsets)
    figure.savefig(args.out, dpi=DPI)
    plt.close(figure)
    return [record[name] for name in names]


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
        heads, (groups, count) = keys.layer.num_heads, keys.points.shape[1:3]
        print(f"{keys.name}: {groups} groups of {count} keys, {heads} heads")
    print(f"drawn to {args.out}")


if __name__ == "__main__":
    main()

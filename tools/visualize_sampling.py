"""Draw detections and the points that deformable convolutions sample for a few positions.

    python tools/visualize_sampling.py CONFIG CHECKPOINT --out sampling.png

A row per image of the validation set: what the detector finds; then, for two detected objects and
the background, the points that one output of a deformable convolution reads, directly and through
the deformable convolutions before it (9**depth points of 3x3 kernels). The brighter a point, the
larger the product of the modulations on its way. White dots are where the same convolutions would
sample without offsets; the cross is the position of the output.
"""

import argparse
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from mmdet.apis import inference_detector, init_detector
from mmdet.registry import DATASETS
from mmdet.structures import DetDataSample
from rich.console import Console
from rich.progress import Progress

from mmdeform.analysis.sampling import LayerSampling, record_sampling, trace_points

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the backend is chosen

PANEL = 3.2  # width of one image in the picture, inches of 200 pixels
Detection = tuple[str, float, np.ndarray, np.ndarray]  # class, score, box (4,), mask (H, W)


def detections_of(
    result: DetDataSample, classes: tuple[str, ...], least_score: float
) -> list[Detection]:
    """Detections of at least this score, best first; the box stands in for a missing mask."""
    found = []
    instances = result.pred_instances.cpu().numpy()
    for index in np.argsort(-instances.scores):
        score, box = float(instances.scores[index]), instances.bboxes[index]
        if "masks" in instances:
            mask = instances.masks[index].astype(bool)
        else:
            mask = np.zeros(result.ori_shape[:2], bool)
            left, top, right, bottom = box.round().astype(int).clip(0)
            mask[top:bottom, left:right] = True
        if score >= least_score and mask.any():
            found.append((classes[instances.labels[index]], score, box, mask))
    return found


def innermost(mask: np.ndarray) -> tuple[int, int]:
    """The pixel (x, y) of ``mask`` (shape (H, W), bool) farthest from its border."""
    padded = np.pad(mask, 1).astype(np.uint8)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return int(x), int(y)


def background_of(info: dict, found: list[Detection]) -> np.ndarray:
    """Where neither an annotated nor a detected object is, shape (H, W), bool."""
    background = ~np.any([mask for *_, mask in found], axis=0)
    for instance in info["instances"]:
        left, top, right, bottom = np.round(instance["bbox"]).astype(int).clip(0)
        background[top:bottom, left:right] = False
    return background


def draw_detections(axis: plt.Axes, found: list[Detection], colors: dict[str, tuple]) -> None:
    for name, score, (left, top, right, bottom), mask in found:
        axis.contour(mask, [0.5], colors=[colors[name]], linewidths=1.6)
        axis.add_patch(
            plt.Rectangle((left, top), right - left, bottom - top, fill=False, ec=colors[name])
        )
        axis.text(
            np.clip(left, 0, mask.shape[1] - 1),
            max(top, 0),
            f"{name} {score:.2f}",
            fontsize=7,
            va="bottom" if top > 8 else "top",
            bbox=dict(fc=colors[name], ec="none", pad=1),
        )


def draw_points(
    axis: plt.Axes, layers: list[LayerSampling], x: int, y: int, scale: tuple[float, float]
) -> None:
    """Draws what the output of the last layer nearest to pixel (x, y) reads.

    Args:
        axis: Where to draw.
        layers: Recorded layers, in the order in which they run.
        x, y: Position in the image, pixels.
        scale: (x, y) size of the network's input relative to the image.
    """
    regular, _ = trace_points(layers, x * scale[0], y * scale[1], offsets=False)
    points, weights = trace_points(layers, x * scale[0], y * scale[1])
    regular = np.unique(regular.cpu().numpy().round(2), axis=0) / scale
    order = weights.argsort().cpu()
    points, weights = points.cpu()[order].numpy() / scale, weights.cpu()[order].numpy()
    axis.scatter(*regular.T, s=5, c="white", linewidths=0)
    axis.scatter(*points.T, s=9, c=weights / weights.max(), cmap="autumn", vmin=0, linewidths=0)
    axis.plot(x, y, "+", color="black", markersize=13, markeredgewidth=4)
    axis.plot(x, y, "+", color="lime", markersize=12, markeredgewidth=2)


def draw_row(
    axes: np.ndarray,
    image: np.ndarray,
    found: list[Detection],
    background: np.ndarray,
    layers: list[LayerSampling],
    scale: tuple[float, float],
    colors: dict[str, tuple],
) -> None:
    """One image: detections, points of the largest two objects and of the background."""
    first, second = sorted(found, key=lambda detection: -detection[3].sum())[:2]
    places = [(first[0], first[3]), (second[0], second[3]), ("background", background)]
    dimmed = image // 2
    for axis in axes:
        axis.imshow(image if axis is axes[0] else dimmed, interpolation="bicubic")
        axis.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))
        axis.set(xticks=[], yticks=[])
    draw_detections(axes[0], found, colors)
    axes[0].set_title("detections", fontsize=9)
    for axis, (name, mask) in zip(axes[1:], places, strict=True):
        x, y = innermost(mask)
        draw_points(axis, layers, x, y, scale)
        axis.set_title(f"sampled for: {name}", fontsize=9)


def choose_layers(names: list[str], prefix: str, depth: int) -> list[str]:
    """The last ``depth`` of the layers whose names start with ``prefix``."""
    chosen = [name for name in names if name.startswith(prefix)]
    if not 1 <= depth <= len(chosen):
        raise ValueError(
            f"--depth must be between 1 and the number of deformable convolutions in --layers "
            f"{prefix!r}, which is {len(chosen)}, but got {depth}; all of them: {', '.join(names)}"
        )
    return chosen[-depth:]


def visualize(
    config: Path,
    checkpoint: Path,
    out: Path,
    images: int,
    score: float,
    layers: str,
    depth: int,
    device: str,
) -> int:
    """Writes the picture; see the top of this file and ``--help``. Returns the number of rows."""
    model = init_detector(str(config), str(checkpoint), device=device)
    dataset = DATASETS.build(model.cfg.val_dataloader.dataset)
    classes = dataset.metainfo["classes"]
    colors = dict(zip(classes, plt.get_cmap("Set2").colors * len(classes), strict=False))
    rows = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("detect", total=images)
        for index in range(len(dataset)):
            info = dataset.get_data_info(index)
            with record_sampling(model) as record:
                result = inference_detector(model, info["img_path"])
            found = detections_of(result, classes, score)
            if len(found) < 2:
                continue
            chosen = [record[name] for name in choose_layers(list(record), layers, depth)]
            image = cv2.imread(info["img_path"])[..., ::-1]
            scale = result.get("scale_factor", (1.0, 1.0))
            rows.append((image, found, background_of(info, found), chosen, scale, colors))
            progress.advance(task)
            if len(rows) == images:
                break
    if not rows:
        raise ValueError(
            f"{checkpoint} detects two objects with a score of {score} in no image of the "
            "validation set; train it longer or lower --score"
        )
    height, width = rows[0][0].shape[:2]
    size = (4 * PANEL, len(rows) * (PANEL * height / width + 0.25))
    figure, axes = plt.subplots(len(rows), 4, figsize=size, squeeze=False, layout="constrained")
    for row, content in zip(axes, rows, strict=True):
        draw_row(row, *content)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=200)
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw detections and the points that deformable convolutions sample.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=Path("sampling.png"), help="picture to write")
    parser.add_argument("--images", type=int, default=4, help="number of rows")
    parser.add_argument("--score", type=float, default=0.5, help="least score of a detection")
    parser.add_argument("--layers", default="backbone.layer2", help="prefix of the layers' names")
    parser.add_argument("--depth", type=int, default=3, help="number of layers to look through")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    for path in (args.config, args.checkpoint):
        if not path.is_file():
            parser.error(f"{path} does not exist")
    try:
        rows = visualize(**vars(args))
    except ValueError as error:
        parser.error(str(error))
    print(f"{rows} images drawn to {args.out}")


if __name__ == "__main__":
    main()

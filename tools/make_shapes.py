"""Generate a small data set of warped shapes in COCO format.

Five classes that differ in topology, not in texture: a disc, a ring (one hole), a pair (two holes),
an arc (a ring that is cut open) and a cross (four arms). Every object is bent by a smooth random
deformation, filled and surrounded by textures that are drawn from one pool for all classes, may be
partly covered by others, and has a diameter between an eighth and a half of the image.

    python tools/make_shapes.py data/shapes --train 400 --val 100 --size 160 --seed 0

writes ``train/*.jpg``, ``val/*.jpg``, ``train.json``, ``val.json`` and ``dataset.json`` (the
arguments, so that a second run can tell whether the data set it finds is the one asked for). The
same arguments give the same bytes.

Masks are polygons along pixel edges, so that decoding one gives exactly the pixels that were drawn.
COCO polygons know no holes, and run-length masks are not understood everywhere; a hole is therefore
joined to the outline by a cut of width zero, walked once in each direction. Even-odd rasterisers
such as pycocotools' fill such an outline without a trace of the cut.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.progress import track

FORMAT = 1  # raise it when the same arguments no longer give the same bytes
CLASSES = ("disc", "ring", "pair", "arc", "cross")
MIN_VISIBLE = 0.65  # share of an object that stays in sight


def shape_mask(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where the undeformed shape is.

    Args:
        name (str): One of ``CLASSES``.
        x, y (np.ndarray): Coordinates, shape (H, W); shapes reach to about 1 from the origin.

    Returns:
        np.ndarray: Shape (H, W), bool.
    """
    radius = np.hypot(x, y)
    if name == "disc":
        return radius < 0.9
    if name == "ring":
        return (radius < 1) & (radius > 0.5)
    if name == "pair":
        left, right = np.hypot(x + 0.5, y), np.hypot(x - 0.5, y)
        nearest = np.minimum(left, right)
        return (nearest < 0.58) & (nearest > 0.26)
    if name == "arc":
        return (radius < 1) & (radius > 0.5) & (np.abs(np.arctan2(y, x)) > 0.75)
    if name == "cross":
        return (np.minimum(np.abs(x), np.abs(y)) < 0.27) & (np.maximum(np.abs(x), np.abs(y)) < 1)
    raise ValueError(f"name must be one of {CLASSES}, but got {name!r}")


def draw_shape(name: str, size: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """A randomly placed, turned, stretched and bent shape.

    Args:
        name (str): One of ``CLASSES``.
        size (int): Height and width of the image, pixels.
        rng (np.random.Generator): Source of randomness.

    Returns:
        tuple[np.ndarray, float]: Coverage of every pixel, shape (size, size), float32 in [0, 1],
        and the share of the shape that lies inside the image.
    """
    diameter = size * 2 ** rng.uniform(-3, -1)
    center = rng.uniform(0.25 * diameter, size - 0.25 * diameter, 2)
    turn = rng.uniform(0, 2 * np.pi)
    stretch = 2 ** rng.uniform(-0.25, 0.25)

    # Sample twice per pixel, beyond the image too, to know what the border cuts off.
    margin = size // 2
    ticks = (np.arange(-2 * margin, 2 * (size + margin)) + 0.5) / 2
    window_x = ticks[np.abs(ticks - center[0]) < diameter]
    window_y = ticks[np.abs(ticks - center[1]) < diameter]
    x, y = np.meshgrid((window_x - center[0]), (window_y - center[1]))
    x, y = x / (diameter / 2), y / (diameter / 2)
    cosine, sine = np.cos(turn), np.sin(turn)
    x, y = (cosine * x + sine * y) * stretch, (cosine * y - sine * x) / stretch

    # The bend: plane waves whose gradients sum to less than 1: no fold changes the topology.
    bent_x, bent_y = x.copy(), y.copy()
    for gradient in (0.5, 0.4):
        angle, wave, phase = rng.uniform(0, 2 * np.pi), rng.uniform(1.5, 3.5), rng.uniform(0, 6.28)
        shift = gradient / wave * np.sin(wave * (np.cos(angle) * x + np.sin(angle) * y) + phase)
        direction = rng.uniform(0, 2 * np.pi)
        bent_x += np.cos(direction) * shift
        bent_y += np.sin(direction) * shift

    drawn = np.zeros((len(ticks), len(ticks)), np.float32)
    rows = slice(np.searchsorted(ticks, window_y[0]), np.searchsorted(ticks, window_y[-1]) + 1)
    columns = slice(np.searchsorted(ticks, window_x[0]), np.searchsorted(ticks, window_x[-1]) + 1)
    drawn[rows, columns] = shape_mask(name, bent_x, bent_y)
    inside = drawn[2 * margin : 2 * (margin + size), 2 * margin : 2 * (margin + size)]
    coverage = inside.reshape(size, 2, size, 2).mean((1, 3))
    return coverage, float(inside.sum() / max(drawn.sum(), 1))


def texture(size: int, rng: np.random.Generator) -> np.ndarray:
    """Two random colours, blended by noise or stripes. Shape (size, size, 3), float32."""
    first = rng.uniform(20, 235, 3)
    second = np.clip(first + rng.normal(0, 45, 3), 0, 255)
    if rng.random() < 0.3:
        angle, period = rng.uniform(0, np.pi), rng.uniform(4, 14)
        y, x = np.mgrid[:size, :size]
        blend = 0.5 + 0.5 * np.sin(2 * np.pi / period * (np.cos(angle) * x + np.sin(angle) * y))
    else:
        cells = int(rng.integers(3, max(size // 4, 4) + 1))
        noise = rng.random((cells, cells), np.float32)
        blend = np.clip(cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC), 0, 1)
    grain = rng.normal(0, 6, (size, size, 1))
    blended = first + (second - first) * blend[..., None] + grain
    return np.clip(blended, 0, 255).astype(np.float32)


def draw_image(size: int, rng: np.random.Generator) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """One image and its objects.

    Args:
        size (int): Height and width, pixels.
        rng (np.random.Generator): Source of randomness.

    Returns:
        tuple[np.ndarray, list[dict]]: The image, shape (size, size, 3), uint8, BGR; and per object
        ``name`` and ``mask``, its visible pixels, shape (size, size), bool.
    """
    background = texture(size, rng)
    image = background.copy()
    drawn: list[dict[str, Any]] = []
    wanted = int(rng.integers(2, 7))
    for _ in range(10 * wanted):
        name = CLASSES[int(rng.integers(len(CLASSES)))]
        coverage, inside = draw_shape(name, size, rng)
        mask = coverage >= 0.5
        fill = texture(size, rng)
        if inside < MIN_VISIBLE or not mask.any():
            continue
        if np.abs(fill[mask].mean(0) - background[mask].mean(0)).max() < 30:
            continue  # nobody could see it
        remaining = [shape["mask"] & ~mask for shape in drawn]
        if any(
            left.sum() < MIN_VISIBLE * shape["full_area"]
            for left, shape in zip(remaining, drawn, strict=True)
        ):
            continue
        for left, shape in zip(remaining, drawn, strict=True):
            shape["mask"] = left
        image += coverage[..., None] * (fill - image)
        drawn.append(dict(name=name, mask=mask, full_area=mask.sum() / inside))
        if len(drawn) == wanted:
            break
    objects = [dict(name=shape["name"], mask=shape["mask"]) for shape in drawn]
    return np.rint(image).astype(np.uint8), objects


def trace_loops(mask: np.ndarray) -> list[np.ndarray]:
    """Closed loops along the pixel edges between foreground and background.

    Args:
        mask (np.ndarray): Shape (H, W), bool.

    Returns:
        list[np.ndarray]: Loops of corners, shape (N, 2), x before y, in pixels from the top left
        corner of the image; the first corner is not repeated. Outlines run clockwise on the screen
        and holes the other way. Foreground pixels that touch at a corner only are kept apart.
    """
    padded = np.pad(mask, 1)
    sides = (  # the neighbour across a side of a pixel; where that side starts; its direction
        (padded[:-2, 1:-1], (0, 0), (1, 0)),
        (padded[1:-1, 2:], (1, 0), (0, 1)),
        (padded[2:, 1:-1], (1, 1), (-1, 0)),
        (padded[1:-1, :-2], (0, 1), (0, -1)),
    )
    edges = dict.fromkeys(
        (column + dx, row + dy, *direction)
        for neighbour, (dx, dy), direction in sides
        for row, column in np.argwhere(mask & ~neighbour).tolist()
    )
    loops = []
    while edges:
        edge = start = next(iter(edges))
        corners = []
        while edge in edges:
            del edges[edge]
            x, y, dx, dy = edge
            x, y = x + dx, y + dy
            right, ahead, left = (x, y, -dy, dx), (x, y, dx, dy), (x, y, dy, -dx)
            edge = next(turn for turn in (right, ahead, left) if turn in edges or turn == start)
            if edge != ahead:
                corners.append((x, y))
        loops.append(np.array(corners))
    return loops


def mask_to_polygons(mask: np.ndarray) -> list[list[int]]:
    """Polygons that cover exactly the foreground of ``mask``, see the top of this file.

    Args:
        mask (np.ndarray): Shape (H, W), bool.

    Returns:
        list[list[int]]: One polygon [x1, y1, x2, y2, ...] per 4-connected component.
    """
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    polygons = []
    for label in range(1, count):
        # The outline reaches further to the left than any hole in it.
        outline, *holes = sorted(trace_loops(labels == label), key=lambda loop: loop[:, 0].min())
        for hole in holes:
            distance = np.abs(outline[:, None] - hole).sum(2)
            here, there = np.unravel_index(distance.argmin(), distance.shape)
            cut = np.concatenate([hole[there:], hole[: there + 1]])
            outline = np.concatenate([outline[: here + 1], cut, outline[here:]])
        polygons.append(outline.ravel().tolist())
    return polygons


def annotate(mask: np.ndarray) -> dict[str, Any]:
    """Box, area and polygons of ``mask`` (shape (H, W), bool) with the keys of COCO annotations."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return dict(
        bbox=[left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        area=int(mask.sum()),
        segmentation=mask_to_polygons(mask),
        iscrowd=0,
    )


def make_split(out: Path, split: str, count: int, size: int, seed: int) -> None:
    """Write ``count`` images into ``out/split`` and their annotations into ``out/split.json``."""
    (out / split).mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in track(range(count), f"{split:5}", console=Console(stderr=True)):
        # A generator for each image: image 7 does not depend on how many others are asked for.
        image, objects = draw_image(size, np.random.default_rng([seed, split == "val", index]))
        name = f"{index:06d}.jpg"
        if not cv2.imwrite(str(out / split / name), image, [cv2.IMWRITE_JPEG_QUALITY, 92]):
            raise OSError(f"cannot write {out / split / name}")
        images.append(dict(id=index, file_name=name, width=size, height=size))
        for shape in objects:
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=index,
                    category_id=CLASSES.index(shape["name"]) + 1,
                    **annotate(shape["mask"]),
                )
            )
    categories = [dict(id=index + 1, name=name) for index, name in enumerate(CLASSES)]
    content = dict(images=images, annotations=annotations, categories=categories)
    (out / f"{split}.json").write_text(json.dumps(content))


def make_shapes(out: Path, train: int, val: int, size: int, seed: int, overwrite: bool) -> bool:
    """Generate the data set, or find it in place.

    Args:
        out (Path): The folder to write.
        train, val (int): Numbers of images, at least 1.
        size (int): Height and width of the images in pixels, at least 64.
        seed (int): At least 0.
        overwrite (bool): Whether to replace another data set of this tool in ``out``.

    Returns:
        bool: Whether anything had to be written. A run that was interrupted is started again.

    Raises:
        ValueError: If an argument is out of range.
        FileExistsError: If ``out`` holds something else.
    """
    for name, value, least in (("train", train, 1), ("val", val, 1), ("size", size, 64)):
        if value < least:
            raise ValueError(f"--{name} must be at least {least}, but got {value}")
    if seed < 0:
        raise ValueError(f"--seed must not be negative, but got {seed}")

    arguments = dict(format=FORMAT, train=train, val=val, size=size, seed=seed)
    record = out / "dataset.json"
    if record.exists():
        found = json.loads(record.read_text())
        if found == dict(arguments, complete=True):
            return False
        if {**found, "complete": False} != dict(arguments, complete=False):
            if not overwrite:
                raise FileExistsError(
                    f"{out} holds another data set, {found}, but this one is asked for: "
                    f"{arguments}; choose another folder, or replace it with --overwrite"
                )
            shutil.rmtree(out)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not a folder of shapes and not empty; choose another one")

    out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(dict(arguments, complete=False)))
    make_split(out, "train", train, size, seed)
    make_split(out, "val", val, size, seed)
    record.write_text(json.dumps(dict(arguments, complete=True)))
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Generate a small data set of warped shapes in COCO format.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="folder of the data set")
    parser.add_argument("--train", type=int, default=400, help="number of training images")
    parser.add_argument("--val", type=int, default=100, help="number of validation images")
    parser.add_argument("--size", type=int, default=160, help="height and width, pixels")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    parser.add_argument("--overwrite", action="store_true", help="replace another data set in OUT")
    args = parser.parse_args()
    try:
        written = make_shapes(**vars(args))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    state = "written to" if written else "already in"
    print(f"{args.train} training and {args.val} validation images {state} {args.out}")


if __name__ == "__main__":
    main()

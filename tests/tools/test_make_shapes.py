"""The generated data set: the same every time, valid COCO, and about topology."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2")
pytest.importorskip("rich")
TOOL = Path(__file__).parents[2] / "tools" / "make_shapes.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_shapes", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shapes(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "shapes"
    assert tool.make_shapes(out, train=12, val=4, size=128, seed=3, overwrite=False)
    return out


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def count_parts(mask: np.ndarray) -> tuple[int, int]:
    """Connected components and holes of a mask."""
    parts = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[0] - 1
    outside = np.pad(~mask, 1, constant_values=True).astype(np.uint8)
    return parts, cv2.connectedComponents(outside, connectivity=8)[0] - 2


def test_same_arguments_give_same_bytes(tool: ModuleType, shapes: Path, tmp_path: Path) -> None:
    tool.make_shapes(tmp_path / "again", train=12, val=4, size=128, seed=3, overwrite=False)
    assert read_all(shapes) == read_all(tmp_path / "again")


def test_images_depend_on_seed_split_and_index_only(
    tool: ModuleType, shapes: Path, tmp_path: Path
) -> None:
    tool.make_shapes(tmp_path / "few", train=2, val=1, size=128, seed=3, overwrite=False)
    tool.make_shapes(tmp_path / "other", train=2, val=1, size=128, seed=4, overwrite=False)
    image = "train/000001.jpg"
    assert (tmp_path / "few" / image).read_bytes() == (shapes / image).read_bytes()
    assert (tmp_path / "other" / image).read_bytes() != (shapes / image).read_bytes()
    assert (shapes / "train/000001.jpg").read_bytes() != (shapes / "val/000001.jpg").read_bytes()


@pytest.mark.parametrize("split", ["train", "val"])
def test_annotations_are_valid(shapes: Path, split: str) -> None:
    coco = pytest.importorskip("pycocotools.coco").COCO(str(shapes / f"{split}.json"))
    names = [category["name"] for category in coco.loadCats(coco.getCatIds())]
    assert names == ["disc", "ring", "pair", "arc", "cross"]
    assert len(coco.imgs) == len(list((shapes / split).glob("*.jpg"))) > 0
    for image in coco.imgs.values():
        pixels = cv2.imread(str(shapes / split / image["file_name"]))
        assert pixels.shape == (image["height"], image["width"], 3) == (128, 128, 3)
    assert len(coco.anns) > 2 * len(coco.imgs)
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation).astype(bool)
        assert mask.sum() == annotation["area"] > 0
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        left, top, width, height = annotation["bbox"]
        assert (left, left + width - 1) == (columns[0], columns[-1])
        assert (top, top + height - 1) == (rows[0], rows[-1])


def test_polygons_decode_to_the_drawn_pixels(tool: ModuleType) -> None:
    masks = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    with_holes = 0
    for index in range(40):
        if index < 20:
            _, objects = tool.draw_image(96, rng)
            drawn = [shape["mask"] for shape in objects]
        else:  # diagonal contacts, holes in holes, single pixels
            drawn = [rng.random((int(rng.integers(1, 12)), int(rng.integers(1, 12)))) < 0.6]
        for mask in drawn:
            polygons = tool.mask_to_polygons(mask)
            with_holes += count_parts(mask)[1]
            assert len(polygons) == count_parts(mask)[0]
            if polygons:
                rle = masks.merge(masks.frPyObjects(polygons, *mask.shape))
                assert np.array_equal(masks.decode(rle).astype(bool), mask)
    assert with_holes > 30


def test_loops_keep_corner_contacts_apart(tool: ModuleType) -> None:
    loops = tool.trace_loops(np.eye(2, dtype=bool))
    assert sorted(map(len, loops)) == [4, 4]
    ring = np.ones((3, 4), bool)
    ring[1, 1:3] = False
    outline, hole = sorted(tool.trace_loops(ring), key=lambda loop: loop.min())
    assert set(map(tuple, outline)) == {(0, 0), (4, 0), (4, 3), (0, 3)}
    assert set(map(tuple, hole)) == {(1, 1), (3, 1), (3, 2), (1, 2)}


@pytest.mark.parametrize(
    ("name", "holes"), [("disc", 0), ("ring", 1), ("pair", 2), ("arc", 0), ("cross", 0)]
)
def test_bending_keeps_the_topology(tool: ModuleType, name: str, holes: int) -> None:
    rng = np.random.default_rng(5)
    complete, solidity = 0, []
    while complete < 25:
        coverage, inside = tool.draw_shape(name, 192, rng)
        mask = coverage >= 0.5
        if inside < 1 or mask.sum() < 1000:
            continue  # cut off, or too small for its holes to show
        assert count_parts(mask) == (1, holes)
        complete += 1
        outline = max(
            cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0],
            key=len,
        )
        solidity.append(cv2.contourArea(outline) / cv2.contourArea(cv2.convexHull(outline)))
    # What tells the three classes without holes apart is how much of their hull they fill.
    if name == "disc":
        assert min(solidity) > 0.85
    if name in ("arc", "cross"):
        assert np.median(solidity) < 0.8


def test_objects_stay_in_sight(tool: ModuleType) -> None:
    rng = np.random.default_rng(1)
    occluded = 0
    for _ in range(30):
        image, objects = tool.draw_image(128, rng)
        assert image.dtype == np.uint8 and image.shape == (128, 128, 3)
        assert 1 <= len(objects) <= 6
        cover = np.sum([shape["mask"] for shape in objects], axis=0)
        assert cover.max() == 1  # masks are what is visible: they do not overlap
        occluded += sum(count_parts(shape["mask"])[0] > 1 for shape in objects)
    assert occluded > 0


def test_a_finished_data_set_is_left_alone(tool: ModuleType, shapes: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in shapes.rglob("*")}
    assert not tool.make_shapes(shapes, train=12, val=4, size=128, seed=3, overwrite=False)
    assert before == {path: path.stat().st_mtime_ns for path in shapes.rglob("*")}


def test_an_interrupted_run_is_finished(tool: ModuleType, tmp_path: Path, monkeypatch) -> None:
    arguments = dict(train=3, val=2, size=64, seed=0, overwrite=False)
    tool.make_shapes(tmp_path / "whole", **arguments)
    draw, calls = tool.draw_image, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(tool, "draw_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tool.make_shapes(tmp_path / "broken", **arguments)
    assert tool.make_shapes(tmp_path / "broken", **arguments)
    assert read_all(tmp_path / "broken") == read_all(tmp_path / "whole")


def test_another_data_set_is_not_replaced_silently(tool: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "shapes"
    tool.make_shapes(out, train=3, val=1, size=64, seed=0, overwrite=False)
    with pytest.raises(FileExistsError, match=r"'seed': 0.*'seed': 1.*--overwrite"):
        tool.make_shapes(out, train=2, val=1, size=64, seed=1, overwrite=False)
    assert tool.make_shapes(out, train=2, val=1, size=64, seed=1, overwrite=True)
    assert len(list((out / "train").iterdir())) == 2


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_files_are_never_touched(tool: ModuleType, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not a folder of shapes and not empty"):
        tool.make_shapes(tmp_path, train=1, val=1, size=64, seed=0, overwrite=overwrite)
    assert read_all(tmp_path) == {"thesis.txt": b"mine"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "0"], "--train must be at least 1, but got 0"),
        (["--val", "-2"], "--val must be at least 1, but got -2"),
        (["--size", "32"], "--size must be at least 64, but got 32"),
        (["--seed", "-1"], "--seed must not be negative, but got -1"),
        (["--size", "big"], "invalid int value: 'big'"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, arguments: list[str], message: str) -> None:
    command = [sys.executable, str(TOOL), str(tmp_path / "out"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), str(tmp_path / "out"), "--train", "2", "--val", "1"]
    for state in ("written to", "already in"):
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert f"2 training and 1 validation images {state}" in result.stdout
    record = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert record["complete"] and (record["size"], record["seed"]) == (160, 0)

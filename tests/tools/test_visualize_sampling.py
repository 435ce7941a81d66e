"""The tool draws layers of every kind, writes the numbers behind, and says what is wrong."""

import functools
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("rich")
import cv2
from mmengine import Config

from mmdeform.analysis.detectors import load_detector

from ..analysis.all_kinds import DETECTORS, KINDS, config_of, move, write_data

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools/visualize_sampling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.save = functools.partial(module.save, dpi=50)  # which is faster
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, and of a config and checkpoint for each detector."""
    folder = tmp_path_factory.mktemp("sampling")
    data = write_data(folder)
    for name, model in DETECTORS.items():
        Config(config_of(model(), data)).dump(folder / f"{name}.py")
        torch.manual_seed(1)
        detector = load_detector(folder / f"{name}.py")
        move(detector)
        meta = dict(dataset_meta=data["metainfo"])
        torch.save(dict(state_dict=detector.state_dict(), meta=meta), folder / f"{name}.pth")
    return folder


@pytest.fixture
def run(tool: ModuleType, files: Path, monkeypatch: pytest.MonkeyPatch):
    def run(name: str, *arguments: object) -> None:
        paths = (files / f"{name}.py", files / f"{name}.pth")
        words = map(str, ("visualize_sampling.py", *paths, *arguments))
        monkeypatch.setattr("sys.argv", list(words))
        tool.main()

    return run


@pytest.mark.parametrize("name", DETECTORS)
def test_pictures_of_an_image(name: str, run, files: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "picture.png"
    run(name, files / "1.png", "--score", 0, "--out", out, "--objects", 1)
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert Path(numbers["config"]).name == f"{name}.py"
    assert Path(numbers["checkpoint"]).name == f"{name}.pth"
    assert list(numbers["kinds"]) == KINDS[name]
    output = capsys.readouterr().out
    for kind, rows in numbers["kinds"].items():
        picture = out.with_name(f"picture_{kind}.png")
        height, width = cv2.imread(str(picture)).shape[:2]
        columns = max(len(row["panels"]) for row in rows) + 1
        assert width == pytest.approx(columns * 160, abs=1) and height > 160 / 96 * 64
        panels = [panel for row in rows for panel in row["panels"]]
        layers = [name for p in panels for name in p.get("layers") or [p["layer"]]]
        names = ", ".join(dict.fromkeys(layers))
        assert f"written: {picture} ({kind}: {names})" in output
        assert rows[0]["image"] == str(files / "1.png") and rows[0]["detections"]
        objects = rows[-1]["panels"] if kind in ("roi_pooling", "attention") else ()
        assert all(panel["place"]["box"] for panel in objects)
        if kind in ("convolution", "keys"):
            found, *background = [panel["place"] for panel in rows[0]["panels"]]
            assert found["name"].startswith(("disc", "ring")) and found["box"]
            assert [place["box"] for place in background] in ([], [None])  # objects may cover all
    assert not out.exists()


def test_positions_kinds_and_layers(run, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    run(
        "two_stage", files / "0.png", files / "2.png", "--at", 40, 30, "--at", 3, 3.5, "--kind",
        "convolution", "--layers", "backbone.layer3.**", "--depth", 2, "--group", 1, "--out", out,
    )  # fmt: skip
    first, second = json.loads(out.with_suffix(".json").read_text())["kinds"]["convolution"]
    assert (first["image"], second["image"]) == (str(files / "0.png"), str(files / "2.png"))
    positions = [panel["place"]["position"] for panel in first["panels"]]
    assert positions == [[40, 30], [3, 3.5]]
    for panel in second["panels"]:
        assert panel["layers"] == ["backbone.layer3.0.conv2", "backbone.layer3.1.conv2"]
        assert panel["group"] == 1
    assert cv2.imread(str(out)).shape[1] == 3 * 160


def test_queries_and_heads(run, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    run(
        "detr", files / "1.png", "--query", 7, "--query", 2, "--kind", "attention", "--head", 1,
        "--layers", "decoder.layers.0.*", "--out", out,
    )  # fmt: skip
    (row,) = json.loads(out.with_suffix(".json").read_text())["kinds"]["attention"]
    assert [panel["query"] for panel in row["panels"]] == [7, 2]
    for panel in row["panels"]:
        assert panel["layer"] == "decoder.layers.0.cross_attn" and set(panel["heads"]) == {1}


def test_images_of_the_validation_set(run, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    run("two_stage", "--kind", "convolution", "--images", 2, "--score", 0, "--out", out)
    rows = json.loads(out.with_suffix(".json").read_text())["kinds"]["convolution"]
    assert [Path(row["image"]).name for row in rows] == ["0.png", "1.png"]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("two_stage", ("--at", 96, 3), "position must lie in 1.png, which is 96 pixels wide and"),
        ("two_stage", ("--layers", "neck.*"), "'neck.*' matches no deformable layer"),
        ("two_stage", ("--score", 1.5), "lower it, or give positions --at"),
        ("two_stage", ("--kind", "keys", "--at", 3, 3), "no layer of 'keys' ran; there are conv"),
        ("two_stage", ("--query", 0), "the detector has no object queries"),
        ("two_stage", ("--depth", 0, "--at", 3, 3), "depth must be at least 1, but got 0"),
        ("two_stage", ("--group", 2, "--at", 3, 3), "group must be between 0 and 1"),
        ("two_stage", ("--objects", 0), "--objects must be at least 1, but got 0"),
        ("detr", ("--query", 12), "query must be between 0 and 11, but got 12"),
        ("detr", ("--head", 2, "--at", 3, 3), "head must be between 0 and 1"),
    ],
)
def test_wrong_options_are_refused(
    name: str, arguments: tuple, message: str, run, files: Path, tmp_path: Path, capsys
) -> None:
    with pytest.raises(SystemExit) as error:
        run(name, files / "1.png", *arguments, "--out", tmp_path / "picture.png")
    assert error.value.code == 2 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_wrong_files_are_refused(
    tool: ModuleType, files: Path, run, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    config, checkpoint = files / "detr.py", files / "detr.pth"
    for arguments, message in (
        ((config, files / "two_stage.pth"), "of the weights of DeformableDETR"),
        ((config, files / "missing.pth"), "missing.pth does not exist"),
        ((config, checkpoint, files / "missing.png"), "missing.png does not exist"),
        ((config, checkpoint, config), "detr.py is no image that OpenCV can read"),
    ):
        monkeypatch.setattr("sys.argv", ["visualize_sampling.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as error:
            tool.main()
        assert error.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("detr", "--score", 1.5)
    assert "detects two objects with a score of 1.5 in no image" in capsys.readouterr().err

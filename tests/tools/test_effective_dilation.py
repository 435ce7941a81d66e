"""The tool measures a detector over its data set and writes a table, a picture and the numbers."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
from mmengine import Config

from mmdeform.analysis.detectors import load_detector
from mmdeform.analysis.dilation import LayerDilation
from mmdeform.analysis.dilation.drawing import draw_dilation, labels_of

from ..models.small_retinanet import REPLACED, RULE, retinanet

ROOT = Path(__file__).parents[2]
BOXES = {
    1: [[2, 2, 20, 20]],
    2: [[5, 5, 50, 40], [60, 4, 10, 10]],
    3: [],
    4: [],
}  # x, y, width, height


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "effective_dilation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A detector whose first deformable layer is stretched, with a data set of four images."""
    folder = tmp_path_factory.mktemp("dilation")
    images, annotations = [], []
    for index, boxes in BOXES.items():
        name = f"{index}.png"
        pixels = np.random.default_rng(index).integers(0, 255, (50, 75, 3), np.uint8)
        cv2.imwrite(str(folder / name), pixels)
        images.append(dict(id=index, file_name=name, width=75, height=50))
        for box in boxes:
            area = box[2] * box[3]
            annotations.append(
                dict(id=len(annotations) + 1, image_id=index, category_id=1, bbox=box, area=area,
                     iscrowd=0)
            )  # fmt: skip
    coco = dict(images=images, annotations=annotations, categories=[dict(id=1, name="disc")])
    (folder / "val.json").write_text(json.dumps(coco))
    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="Resize", scale=(75, 50), keep_ratio=True),
        dict(type="PackDetInputs", meta_keys=("ori_shape", "img_shape", "scale_factor")),
    ]
    dataset = dict(
        type="CocoDataset", data_root=str(folder), ann_file="val.json", data_prefix=dict(img=""),
        metainfo=dict(classes=("disc",)), test_mode=True, pipeline=pipeline,
    )  # fmt: skip
    model = dict(type="mmdeform.Transplant", model=retinanet(), rules=[RULE])
    model["model"]["test_cfg"]["max_per_img"] = 20
    loader = dict(dataset=dataset)
    settings = dict(default_scope="mmdet", model=model, val_dataloader=loader)
    config = folder / "config.py"
    Config(dict(settings, test_dataloader=loader)).dump(config)
    detector = load_detector(config)
    steps = torch.tensor([-1.0, 0, 1])
    taps = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).flatten()
    bias = detector.get_submodule(REPLACED[0]).conv_offset.bias.data
    bias[:18], bias[18:36] = taps, 2 * taps  # effective dilation 2 and 3
    checkpoint = folder / "epoch_1.pth"
    torch.save(dict(state_dict=detector.state_dict()), checkpoint)
    return config, checkpoint


def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["effective_dilation.py", *map(str, arguments)])
    tool.main()


def test_of_a_detector(
    tool: ModuleType,
    files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    out = tmp_path / "new" / "folder" / "dilation.png"
    run(tool, monkeypatch, *files, "--out", out, "--sizes", 15, 40)
    picture = cv2.imread(str(out))
    assert picture is not None and picture.std() > 5
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["config"] == str(files[0]) and report["checkpoint"] == str(files[1])
    assert report["images"] == ["1.png", "2.png", "3.png", "4.png"] and report["split"] == "val"
    assert report["objects"] == dict(small=1, medium=1, large=1)
    assert report["size_limits_in_image_pixels"] == [15, 40]

    layers = report["layers"]
    assert [layer["layer"] for layer in layers] == REPLACED
    assert [layer["stride_in_image_pixels"] for layer in layers] == [
        [stride, stride] for stride in (16, 16, 32, 32)
    ]
    for layer, value in zip(layers, (2.5, 1, 1, 1), strict=True):
        assert layer["dilation_without_offsets"] == 1
        assert layer["in_map_pixels"]["background"]["mean"] == pytest.approx(value, rel=1e-6)
        stride = layer["stride_in_image_pixels"][0]
        assert layer["in_image_pixels"]["background"]["mean"] == pytest.approx(value * stride)
        groups = [part["large"]["mean"] for part in layer["in_map_pixels_of_deform_groups"]]
        assert groups == pytest.approx([2, 3] if value == 2.5 else [1, 1], rel=1e-6)
    # Outputs at 0, 16, 32, 48, 64 and 0, 16, 32, 48: boxes 2 to 22, 60 to 70 and 5 to 55, 45.
    counts = {name: part["filters"] for name, part in layers[0]["in_map_pixels"].items()}
    assert counts == dict(small=0, medium=1, large=6, background=4 * 20 - 7)
    assert layers[0]["in_map_pixels"]["small"] == dict(filters=0, mean=None, std=None)

    printed = capsys.readouterr().out
    assert "objects: 1 small, 1 medium, 1 large" in printed
    assert f"{out} and {out.with_suffix('.json')} written" in printed
    line = next(line for line in printed.splitlines() if "layer3.0.conv2" in line)
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells == [
        "layer3.0.conv2", "16", "1", "-", "2.50 ± 0.00", "2.50 ± 0.00", "2.50 ± 0.00",
        "- / 40.0 / 40.0 / 40.0",
    ]  # fmt: skip


def test_fewer_images_layers_and_options(
    tool: ModuleType, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "dilation.png"
    run(
        tool, monkeypatch, *files, "--out", out, "--images", 2, "--split", "test", "--layers",
        "**.layer4.*.conv2", "--cfg-options", "model.model.test_cfg.score_thr=0.5",
    )  # fmt: skip
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["images"] == ["1.png", "3.png"] and report["split"] == "test"
    assert [layer["layer"] for layer in report["layers"]] == REPLACED[2:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "0"], "must be at least 1, got 0"),
        (["--sizes", "96", "32"], "sizes must be positive and increase, got 96.0 32.0"),
        (["--layers", "neck.**"], "'neck.**' matches no deformable layer of RetinaNet"),
        (["--split", "train"], "has no train_dataloader"),
        (["--out", "numbers.json"], "--out must name a picture, but got numbers.json"),
        (["--cfg-options", "val_dataloader.dataset.ann_file=no.json"], "is not there"),
        (["--cfg-options", "model.rules=[]"], "has no deformable layer"),
    ],
)
def test_bad_arguments(
    tool: ModuleType,
    files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        run(tool, monkeypatch, *files, *arguments)
    assert error.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_missing_files(
    tool: ModuleType,
    files: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    with pytest.raises(SystemExit):
        run(tool, monkeypatch, files[0], "nowhere.pth")
    assert "nowhere.pth does not exist" in capsys.readouterr().err


def rows(*names: str) -> list[LayerDilation]:
    made = [LayerDilation(name, names[:i].count(name), 1.0) for i, name in enumerate(names)]
    for index, row in enumerate(made):
        values = np.array([[1.0 + index, 3.0 + index]])
        row.add(values, 8 * values, np.array([0, 0]), (8, 8))
    return made


def test_labels() -> None:
    assert labels_of(rows("a.b.c", "a.b.d", "a.x.d")) == ["b.c", "b.d", "x.d"]
    assert labels_of(rows("a.b", "a.b", "a.c")) == ["b [0]", "b [1]", "c"]
    assert labels_of(rows("a.b.c")) == ["c"] and labels_of(rows("")) == [""]
    assert labels_of(rows("a", "a.b")) == ["a", "a.b"]


def test_the_picture_shows_means_and_deviations() -> None:
    figure = draw_dilation(rows("a.b", "a.c"))
    above, below = figure.axes
    for axis, unit in ((above, 1), (below, 8)):
        drawn = {bars.get_label(): bars for bars in axis.containers}
        assert list(drawn) == ["small", "medium", "large", "background"]
        points, _, (deviations,) = drawn["small"].lines
        assert points.get_ydata().tolist() == [2 * unit, 3 * unit]
        segments = [segment[:, 1].tolist() for segment in deviations.get_segments()]
        assert segments == [[unit, 3 * unit], [2 * unit, 4 * unit]]
        assert not len(drawn["large"].lines[0].get_ydata())
    assert [text.get_text() for text in below.get_xticklabels()] == ["b", "c"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "without offsets", "small", "medium", "large", "background",
    ]  # fmt: skip

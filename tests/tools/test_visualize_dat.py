"""Pictures show keys where they are in the image, as large as the attention that they get."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
import cv2
from mmengine import Config
from mmengine.registry import init_default_scope

ROOT = Path(__file__).parents[2]
BACKBONE = dict(
    type="mmdeform.DAT",
    img_size=64,
    stem_dims=8,
    dims=(8, 8, 16, 16),
    num_heads=(1, 1, 4, 4),
    num_groups=(1, 1, 2, 2),
    stage_specs=("L", "L", "DD", "D"),
)
DETECTOR = dict(
    default_scope="mmdet",
    model=dict(
        type="RetinaNet",
        backbone=BACKBONE,
        data_preprocessor=dict(
            type="DetDataPreprocessor", mean=[0.0] * 3, std=[1.0] * 3, pad_size_divisor=32
        ),
    ),
    test_dataloader=dict(
        dataset=dict(
            pipeline=[
                dict(type="LoadImageFromFile"),
                dict(type="Resize", scale=(200, 120), keep_ratio=True),
                dict(type="PackDetInputs", meta_keys=("ori_shape", "img_shape", "scale_factor")),
            ]
        )
    ),
)
DPI = 200
SIZE = (75, 50)  # width, height; the detector makes 180 x 120 of it, padded to 192 x 128


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "visualize_dat.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A bright spot at (50, 20), dark elsewhere."""
    x, y = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    spot = 200 * np.exp(-((x - 50) ** 2 + (y - 20) ** 2) / 18)
    path = tmp_path / "image.png"
    cv2.imwrite(str(path), np.repeat(spot[..., None], 3, 2).astype(np.uint8))
    return path


def write(folder: Path, **settings) -> Path:
    path = folder / "config.py"
    Config(settings).dump(path)
    return path


def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["visualize_dat.py", *map(str, arguments)])
    tool.main()


@pytest.mark.parametrize("config", ["detector", "size", "own size"])
def test_points_of_the_image_and_of_the_inputs(tool: ModuleType, image: Path, config: str) -> None:
    init_default_scope("mmdet")
    cfg = Config(DETECTOR if config == "detector" else dict(model=BACKBONE))
    picture, inputs = tool.prepare(cfg, image, (150, 200) if config == "size" else None)
    sizes = {"detector": (128, 192), "size": (200, 150), "own size": (50, 75)}
    scales = {"detector": (2.4, 2.4), "size": (2, 4), "own size": (1, 1)}
    assert picture.pixels.shape == (50, 75, 3)
    assert inputs.shape == (1, 3, *sizes[config])
    assert picture.scale == pytest.approx(scales[config])
    # The spot is where it is said to be.
    spot = inputs[0].double().mean(0)
    spot = (spot - spot[0, 0]).clamp(0)
    rows, columns = (torch.arange(length).double() for length in spot.shape)
    centre = np.array([spot.sum(0) @ columns, spot.sum(1) @ rows]) / float(spot.sum())
    assert centre == pytest.approx(picture.to_inputs((50, 20)), abs=0.05)
    assert picture.from_inputs(centre) == pytest.approx((50, 20), abs=0.05)


def test_backbones_get_normalised_rgb(tool: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    cv2.imwrite(str(path), np.full((4, 6, 3), (10, 20, 200), np.uint8))  # BGR
    picture, inputs = tool.prepare(Config(dict(model=BACKBONE)), path, None)
    assert picture.pixels[2, 3].tolist() == [200, 20, 10]
    red, green, blue = (200 - 123.675) / 58.395, (20 - 116.28) / 57.12, (10 - 103.53) / 57.375
    torch.testing.assert_close(inputs[0, :, 2, 3], torch.tensor([red, green, blue]))


def size_of(path: Path) -> tuple[int, int]:
    height, width = cv2.imread(str(path)).shape[:2]
    return width, height


def test_picture_of_a_backbone(
    tool: ModuleType, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    config, out = write(tmp_path, model=BACKBONE), tmp_path / "new" / "keys.png"
    arguments = ("--stage", 3, 4, "--out", out, "--offsets", "--size", 64, 96)
    run(tool, monkeypatch, config, image, *arguments)
    panel = tool.PANEL * DPI
    assert size_of(out) == pytest.approx((2 * panel, panel * 50 / 75 + 0.55 * DPI), abs=1)
    output = capsys.readouterr().out
    assert "no checkpoint: weights are as they are before training" in output
    assert "stages.2.attns.1: 2 groups of 24 keys, 4 heads" in output
    assert "stages.3.attns.0: 2 groups of 6 keys, 4 heads" in output
    assert f"drawn to {out}" in output


def test_picture_of_a_detector(
    tool: ModuleType, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    init_default_scope("mmdet")
    trained = tool.build_backbone(Config(DETECTOR), None)
    weights = {f"backbone.{name}": tensor for name, tensor in trained.state_dict().items()}
    checkpoint = tmp_path / "epoch_1.pth"
    torch.save(dict(state_dict=weights), checkpoint)
    loaded = tool.build_backbone(Config(DETECTOR), checkpoint)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name

    del weights["backbone.stages.2.attns.1.proj_q.bias"], weights["backbone.norms.0.norm.bias"]
    torch.save(dict(state_dict=weights), tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"lacks 1 weights of the backbone, stages\.2\.attns\.1"):
        tool.build_backbone(Config(DETECTOR), tmp_path / "part.pth")

    config, out = write(tmp_path, **DETECTOR), tmp_path / "keys.jpg"
    queries = ("--query", 50, 20, "--query", 3, 49)
    run(tool, monkeypatch, config, "--stage", 3, 4, *queries, "--out", out, checkpoint, image)
    panel = tool.PANEL * DPI
    height = 2 * (panel * 50 / 75 + 0.25 * DPI) + 0.3 * DPI
    assert size_of(out) == pytest.approx((2 * panel, height), abs=1)
    output = capsys.readouterr().out
    assert "no checkpoint" not in output
    assert "stages.2.attns.1: 2 groups of 96 keys, 4 heads" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--stage", 2), "stage 2 has no deformable block; there are 2 in stage 3, 1 in stage 4"),
        (("--block", 2), "block must be between -2 and 1 in stage 3, but got 2"),
        (("--query", 75, 0), "75 pixels wide and 50 high, but got 75 0"),
        (("--query", 2, -0.6), "75 pixels wide and 50 high, but got 2 -0.6"),
        (("--head", 1, "--group", 0), "give one of --head and --group"),
    ],
)
def test_wrong_options_are_refused(
    tool: ModuleType, image: Path, tmp_path: Path, monkeypatch, capsys, arguments, message: str
) -> None:
    with pytest.raises(SystemExit):
        run(tool, monkeypatch, write(tmp_path, model=BACKBONE), image, *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(model=dict(type="mmdet.ResNet", depth=18)), "ResNet has no block with deformable"),
        (dict(total_epochs=3), "has no model"),
    ],
)
def test_configs_without_dat_are_refused(
    tool: ModuleType, image: Path, tmp_path: Path, monkeypatch, capsys, settings, message: str
) -> None:
    with pytest.raises(SystemExit):
        run(tool, monkeypatch, write(tmp_path, **settings), image)
    assert message in capsys.readouterr().err


def test_files_that_are_missing_or_no_images_are_refused(
    tool: ModuleType, image: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    config = write(tmp_path, model=BACKBONE)
    for arguments, message in (
        ((config, tmp_path / "missing.png"), "missing.png does not exist"),
        ((config, tmp_path / "missing.pth", image), "missing.pth does not exist"),
        ((config, config), "config.py is no image that OpenCV can read"),
        ((config, image, image), "image.png: expected a checkpoint"),
    ):
        with pytest.raises(SystemExit):
            run(tool, monkeypatch, *arguments)
        assert message in capsys.readouterr().err


def test_a_detector_has_its_own_size(tool: ModuleType, image: Path) -> None:
    with pytest.raises(ValueError, match="--size is for backbones alone"):
        tool.prepare(Config(DETECTOR), image, (64, 64))

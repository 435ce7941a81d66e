"""The tool measures a checkpoint and writes what it printed."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import cv2
import pytest
import torch

pytest.importorskip("mmdet")

from ..analysis.small_detector import write_checkpoint, write_config
from ..models.small_retinanet import REPLACED, retinanet

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "effective_dilation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("dilation"))


@pytest.fixture(scope="module")
def checkpoint(config: Path) -> Path:
    """Filters of one layer sample at twice the distance."""
    path = write_checkpoint(config)
    loaded = torch.load(path, weights_only=False)
    bias = loaded["state_dict"][f"{REPLACED[0]}.conv_offset.bias"][:36].view(2, 3, 3, 2)
    bias[..., 0] = torch.arange(-1.0, 2)[None, :, None]
    bias[..., 1] = torch.arange(-1.0, 2)[None, None]
    torch.save(loaded, path)
    return path


def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["effective_dilation.py", *map(str, arguments)])
    tool.main()


def test_end_to_end(
    tool: ModuleType,
    config: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    out = tmp_path / "new" / "dilation.png"
    run(tool, monkeypatch, config, checkpoint, "--out", out, "--sizes", 20, 60)
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["images"] == 1 and report["sizes"]["medium_from"] == 20
    assert [layer["layer"] for layer in report["layers"]] == REPLACED
    first, *others = report["layers"]
    assert first["mean"] == dict(small=2.0, medium=2.0, large=None, background=2.0)
    assert first["std"]["background"] == pytest.approx(0, abs=1e-6) and first["regular"] == 1
    assert first["mean_of_groups"] == [first["mean"]] * 2  # deform groups
    assert all(layer["mean"]["background"] == 1.0 for layer in others)
    # 180 x 120 pixels of the input, seen every 16 pixels; two groups of filters.
    outputs = 2 * math.ceil(180 / 16) * math.ceil(120 / 16)
    assert sum(first["filters"].values()) == outputs
    printed = capsys.readouterr().out
    assert "2.00±0.00" in printed and str(out) in printed
    assert cv2.imread(str(out)).std() > 5  # there is something in the picture


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--layers", "neck.**"], "'neck.**' matches no deformable layer"),
        (["--sizes", "60", "20"], "sizes must be two numbers"),
        (["--split", "train"], "no train_dataloader"),
        (["--images", "0"], "at least one image, got 0"),
        (["--cfg-options", "val_dataloader.dataset.ann_file=gone.json"], "is not there"),
    ],
)
def test_misuse(
    tool: ModuleType,
    config: Path,
    checkpoint: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(tool, monkeypatch, config, checkpoint, *arguments)
    assert message in capsys.readouterr().err


def test_detectors_without_deformable_convolution(
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    model = retinanet()
    model["test_cfg"]["max_per_img"] = 20
    config = write_config(tmp_path, model=model)
    with pytest.raises(SystemExit, match="2"):
        run(tool, monkeypatch, config, write_checkpoint(config))
    assert "RetinaNet has no deformable layer" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run(tool, monkeypatch, config, tmp_path / "none.pth")
    assert "none.pth does not exist" in capsys.readouterr().err

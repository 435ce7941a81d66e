"""Files for the authors' code: what they hold, and the way there and back."""

import importlib.util
import itertools
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmcv.ops")
from mmdeform.models.backbones import DAT
from mmdeform.models.backbones.dat import load_dat_checkpoint

TOOL = Path(__file__).parents[2] / "tools" / "convert_dat.py"
SMALL: dict[str, Any] = dict(
    img_size=64,
    stem_dims=4,
    dims=(4, 8, 16, 32),
    num_heads=(1, 2, 4, 8),
    num_groups=(1, 1, 2, 4),
    stage_specs=("LS", "N", "LD", "D"),
    window_sizes=4,
    neighborhood_sizes=3,
)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_dat", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config(folder: Path, text: str = "backbone=dict(type='mmdeform.DAT', **small)") -> str:
    """A config file; ``small`` stands for the options of the model."""
    file = folder / "config.py"
    file.write_text(f"small = dict({', '.join(f'{k}={v!r}' for k, v in SMALL.items())})\n")
    with file.open("a") as stream:
        stream.write(f"model = dict({text})\n")
    return str(file)


def convert(tool: ModuleType, folder: Path, state: Any, *arguments: str) -> dict[str, Any]:
    torch.save(state, folder / "in.pth")
    tool.main([str(folder / "in.pth"), str(folder / "out.pth"), *arguments])
    return torch.load(folder / "out.pth")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_classifier(tool: ModuleType, tmp_path: Path) -> None:
    model = DAT(**SMALL, num_classes=3)
    text = "type='mmdeform.DAT', num_classes=3, **small"
    result = convert(tool, tmp_path, model.state_dict(), "--config", config(tmp_path, text))
    assert list(result) == ["model"]
    assert_same(result["model"], model.state_dict())
    assert set(result["model"]) - set(model.state_dict()) == {
        "stages.0.attns.0.relative_position_index",
        "stages.0.attns.1.relative_position_index",
        "stages.0.attns.1.attn_mask",
        "stages.2.attns.0.relative_position_index",
    }
    again = DAT(**SMALL, num_classes=3)
    report = load_dat_checkpoint(again, tmp_path / "out.pth")
    assert report.missing == report.unexpected == report.resized == []
    assert_same(again.state_dict(), model.state_dict())


def test_constants_of_windows(tool: ModuleType, tmp_path: Path) -> None:
    """Against loops over the pixels of windows."""
    model = DAT(**SMALL, num_classes=3)
    text = "type='mmdeform.DAT', **small"
    state = convert(tool, tmp_path, model.state_dict(), "--config", config(tmp_path, text))["model"]
    index = state["stages.0.attns.1.relative_position_index"]
    mask = state["stages.0.attns.1.attn_mask"]
    assert index.shape == (16, 16) and index.dtype == torch.int64
    assert mask.shape == (16, 16, 16) and mask.dtype == torch.float32

    def region(position: int) -> int:  # of 16 pixels, in windows of 4 that are shifted by 2
        return 0 if position < 12 else 1 if position < 14 else 2

    pixels = list(itertools.product(range(4), range(4)))
    for (a, (ya, xa)), (b, (yb, xb)) in itertools.product(enumerate(pixels), repeat=2):
        assert index[a, b] == (ya - yb + 3) * 7 + xa - xb + 3
        for window, (row, column) in enumerate(itertools.product(range(0, 16, 4), repeat=2)):
            together = region(row + ya) == region(row + yb)
            together &= region(column + xa) == region(column + xb)
            assert mask[window, a, b] == (0 if together else -100)


def test_detector(tool: ModuleType, tmp_path: Path) -> None:
    model = DAT(**SMALL, layer_scale=0.5)
    own = {f"backbone.{key}": value for key, value in model.state_dict().items()}
    others = {"neck.convs.0.weight": torch.rand(2), "bbox_head.bias": torch.rand(3)}
    checkpoint = {"state_dict": own | others, "meta": {"epoch": 12}, "optimizer": {}}
    text = "backbone=dict(type='mmdeform.DAT', layer_scale=0.1, drop_path_rate=0.3, **small)"
    result = convert(tool, tmp_path, checkpoint, "--config", config(tmp_path, text))
    assert set(result) == {"state_dict", "meta"}
    state = result["state_dict"]
    name = "backbone.stages.0.layer_scales.0"
    assert torch.equal(state.pop(f"{name}.gamma"), own.pop(f"{name}.weight"))
    assert not any("attn_mask" in key for key in state)  # made at run time there
    assert "backbone.stages.2.attns.0.relative_position_index" in state
    scales = {key for key in own if ".layer_scales." in key}
    assert_same(state, {key: own[key] for key in own.keys() - scales} | others)
    again = DAT(**SMALL, layer_scale=0.5)
    assert load_dat_checkpoint(again, tmp_path / "out.pth").missing == []
    assert_same(again.state_dict(), model.state_dict())


def test_some_maps(tool: ModuleType, tmp_path: Path) -> None:
    model = DAT(**SMALL, out_indices=(1, 3))
    state = convert(tool, tmp_path, model.state_dict(), "--config", config(tmp_path))["state_dict"]
    assert {key for key in state if ".norms." in key} == {
        f"backbone.norms.{index}.norm.{name}" for index in (1, 3) for name in ("weight", "bias")
    }


def test_backbone_of_a_detector_for_classification(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = DAT(**SMALL)
    state = {f"backbone.{key}": value for key, value in model.state_dict().items()}
    arguments = ("--config", config(tmp_path), "--layout", "classification")
    result = convert(tool, tmp_path, state | {"neck.x": torch.ones(1)}, *arguments)["model"]
    assert not any(key.startswith(("norms.", "cls_", "neck.", "backbone.")) for key in result)
    assert "left out" in (printed := capsys.readouterr().out)
    assert "norms.0.norm.weight" in printed and "neck.x" in printed


def test_classifier_of_mmpretrain(tool: ModuleType, tmp_path: Path) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = DAT(**SMALL, out_indices=(3,))
            self.head = nn.Module()
            self.head.fc = nn.Linear(32, 3)

    model = Classifier()
    nn.init.normal_(model.backbone.norms[3].norm.weight)
    state = {"state_dict": model.state_dict()}
    result = convert(tool, tmp_path, state, "--config", config(tmp_path))
    classifier = DAT(**SMALL, num_classes=3).eval()
    assert load_dat_checkpoint(classifier, result).missing == []
    image = torch.rand(2, 3, 64, 64)
    expected = model.head.fc(model.eval().backbone(image)[0].mean((2, 3)))
    assert torch.allclose(classifier(image), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected either --config, or --arch and --version"),
        (["--arch", "tiny"], "expected either --config, or --arch and --version"),
        (["--arch", "tiny", "--version", "v1"], r"weights of another model.*patch_proj.0.weight"),
        (["--config", "CONFIG", "--img-size", "96"], r"map made of whole windows of 4.*6 x 6"),
        (["--config", "OTHER"], "expected a backbone mmdeform.DAT, got 'ResNet'"),
        (["--config", "nowhere.py"], "nowhere.py"),
    ],
)
def test_errors(
    tool: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    message: str,
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    files = {
        "CONFIG": config(tmp_path),
        "OTHER": config(other, "backbone=dict(type='ResNet', depth=18)"),
    }
    model = DAT(**{**SMALL, "stage_specs": ("L", "L", "LS", "N")}, num_classes=2)
    if "CONFIG" in arguments:
        text = "type='mmdeform.DAT', **{**small, 'stage_specs': ('L', 'L', 'LS', 'N')}"
        files["CONFIG"] = config(tmp_path, text)
    with pytest.raises(SystemExit) as stop:
        convert(tool, tmp_path, model.state_dict(), *(files.get(a, a) for a in arguments))
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("content", [b"", b"PK\3\4 broken", b"text"])
def test_a_file_that_is_no_checkpoint(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, content: bytes
) -> None:
    (tmp_path / "in.pth").write_bytes(content)
    arguments = ["--arch", "tiny", "--version", "v1"]
    with pytest.raises(SystemExit) as stop:
        tool.main([str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), *arguments])
    assert stop.value.code == 2
    assert "in.pth: expected a file of torch.save" in capsys.readouterr().err


@pytest.mark.parametrize("content", [{"epoch": 1}, {"model": {"fc.weight": torch.ones(1)}}])
def test_a_file_that_is_no_backbone(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, content: dict
) -> None:
    with pytest.raises(SystemExit):
        convert(tool, tmp_path, content, "--config", config(tmp_path))
    assert "in.pth: expected" in capsys.readouterr().err


def test_the_checkpoint_is_not_overwritten(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "in.pth"
    file.write_text("precious")
    with pytest.raises(SystemExit):
        tool.main([str(file), str(file), "--arch", "tiny", "--version", "v1"])
    assert "expected another file" in capsys.readouterr().err and file.read_text() == "precious"


def test_help(tool: ModuleType, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        tool.main(["--help"])
    assert stop.value.code == 0 and "--arch {tiny,small,base}" in capsys.readouterr().out

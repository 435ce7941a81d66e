"""The tool that rewrites weights of InternImage."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("mmcv.ops")
from mmdeform.models import FlashInternImage, InternImage

TOOL = Path(__file__).parents[2] / "tools" / "convert_intern_image.py"
SMALL: dict[str, Any] = dict(channels=8, depths=(1, 1, 1, 1), groups=(1, 2, 2, 4), mlp_ratio=2.0)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_intern_image", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def convert(tool: ModuleType, folder: Path, state: Any, *arguments: str) -> dict[str, Any]:
    torch.save(state, folder / "in.pth")
    tool.main([str(folder / "in.pth"), str(folder / "out.pth"), *arguments])
    return torch.load(folder / "out.pth")


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_classifier(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = InternImage(**SMALL, num_classes=3).state_dict()
    result = convert(tool, tmp_path, {"model": state, "optimizer": {"lr": 1}, "epoch": 299})
    assert list(result) == ["model"]
    assert_equal(result["model"], state)

    result = convert(tool, tmp_path, {"model_ema": state, "model": {}}, "--layout", "detection")
    assert set(result) == {"state_dict", "meta"}
    backbone = {key: value for key, value in state.items() if "head" not in key}
    assert_equal(result["state_dict"], {f"backbone.{key}": v for key, v in backbone.items()})
    printed = capsys.readouterr().out
    assert "left out" in printed and "conv_head.0.weight" in printed and "head.bias" in printed
    report = InternImage(**SMALL).load_checkpoint(tmp_path / "out.pth")
    assert report.missing == report.unexpected == []


@pytest.mark.parametrize("kind", [InternImage, FlashInternImage])
def test_detector(tool: ModuleType, tmp_path: Path, kind: type[InternImage]) -> None:
    own = kind(**SMALL).state_dict()
    state = {f"backbone.{key}": value for key, value in own.items()}
    state |= {"neck.convs.0.weight": torch.rand(2), "bbox_head.bias": torch.rand(3)}
    checkpoint = {"state_dict": state, "meta": {"epoch": 12}, "optimizer": {}}
    assert_equal(convert(tool, tmp_path, checkpoint)["state_dict"], state)
    result = convert(tool, tmp_path, checkpoint, "--layout", "classification")
    assert_equal(result["model"], own)


class TestFlash:
    @pytest.mark.parametrize(
        ("arch", "model", "left_out"),
        [
            ("tiny", "arch='tiny', dcn_output_bias=True, mlp_fc2_bias=True", True),
            (
                "base",
                "arch='base', offset_scale=1.0, dcn_output_bias=True, mlp_fc2_bias=True",
                False,
            ),
        ],
    )
    def test_published_sizes(
        self,
        tool: ModuleType,
        capsys: pytest.CaptureFixture,
        arch: str,
        model: str,
        left_out: bool,
    ) -> None:
        """On the meta device; the printed model takes the weights exactly."""
        with torch.device("meta"):
            source = InternImage(arch)
        _, arguments = tool.arguments_of(source.state_dict())
        state = {key: torch.empty(value.shape) for key, value in source.state_dict().items()}
        state, arguments = tool.make_flash(state, arguments)
        text = tool.describe(FlashInternImage, arguments)
        assert text == f"backbone=dict(type='mmdeform.FlashInternImage', {model})"
        printed = capsys.readouterr().out
        assert re.search(r"exactly as in InternImage: \d+ entries\n", printed)
        assert re.search(r"approximately, and to be trained: \d+ entries offset_mask\.\*", printed)
        assert ("left out, without a counterpart" in printed) == left_out
        with torch.device("meta"):
            options = eval(text.partition("=")[2])
            options.pop("type")
            FlashInternImage(**options).load_state_dict(state, assign=True)

    def test_detector(
        self, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        own = InternImage(**SMALL).state_dict()
        state = {f"backbone.{key}": value for key, value in own.items()}
        state["neck.convs.0.weight"] = torch.rand(2)
        result = convert(tool, tmp_path, {"state_dict": state}, "--flash")["state_dict"]
        assert torch.equal(result["neck.convs.0.weight"], state["neck.convs.0.weight"])
        printed = capsys.readouterr().out
        assert "no published size: give the backbone the offset_scale" in printed
        options = eval(printed.rpartition("backbone=")[2])
        assert options.pop("type") == "mmdeform.FlashInternImage"
        report = FlashInternImage(**options).load_checkpoint({"state_dict": result})
        assert report.missing == report.unexpected == []

    def test_of_flash(
        self, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        with pytest.raises(SystemExit):
            convert(tool, tmp_path, FlashInternImage(**SMALL).state_dict(), "--flash")
        assert "expected weights of InternImage, got FlashInternImage's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels.0.blocks.0.odd": torch.ones(1)}, r"weights of another model.*odd"),
        ({"levels.0.blocks.0.norm1.0.bias": torch.ones(7)}, r"another model.*norm1\.0\.bias"),
        ({"patch_embed.conv1.weight": None}, r"such as 'patch_embed\.conv1\.weight'"),
        ({"levels.1.blocks.0.norm2.0.bias": None}, r"another model.*norm2\.0\.bias"),
    ],
    ids=str,
)
def test_weights_that_are_not_those_of_a_model(
    tool: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    changes: dict[str, Tensor | None],
    message: str,
) -> None:
    state = {**InternImage(**SMALL).state_dict(), **changes}
    with pytest.raises(SystemExit) as stop:
        convert(tool, tmp_path, {k: v for k, v in state.items() if v is not None})
    assert stop.value.code == 2
    assert re.search(rf"in\.pth.*{message}", capsys.readouterr().err, re.DOTALL)
    assert not (tmp_path / "out.pth").exists()


def test_the_checkpoint_is_not_overwritten(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "in.pth"
    file.write_text("precious")
    with pytest.raises(SystemExit):
        tool.main([str(file), str(file)])
    assert "expected another file" in capsys.readouterr().err and file.read_text() == "precious"

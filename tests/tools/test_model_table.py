"""The table of models says what the metafiles and the configs say."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("mmdet")
ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "model_table.py"
TABLE = (ROOT / "docs" / "models.md").read_text().splitlines()


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("model_table", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_agrees_with_the_metafiles(tool: ModuleType) -> None:
    counts = iter(re.findall(r" \| ([\d.]+|-) \| [^|]+ \|$", "\n".join(TABLE), re.M))
    assert list(tool.lines(lambda _: next(counts))) == TABLE
    assert next(counts, None) is None


@pytest.mark.parametrize(
    ("results", "cell"),
    [
        ([], "-"),
        (
            [dict(Dataset="shapes", Metrics={"box AP": 30.5, "mask AP": 20})],
            "box AP 30.5, mask AP 20",
        ),
        ([dict(Dataset="COCO", Metrics={"box AP": 41.4})], "box AP 41.4\\*"),
    ],
)
def test_published_figures_are_marked(tool: ModuleType, results: list, cell: str) -> None:
    assert tool.metrics(dict(Results=results)) == cell


def test_tool_writes_the_table(tool: ModuleType, tmp_path: Path) -> None:
    family = tmp_path / "configs" / "few"
    family.mkdir(parents=True)
    (family / "metafile.yml").write_text(
        "Models: [{Name: small_shapes, Config: configs/few/small_shapes.py, Metadata: {Epochs: 3}}]"
    )
    base = (ROOT / "configs/dcnv2/faster-rcnn_r18_shapes.py").as_posix()
    (family / "small_shapes.py").write_text(f"_base_ = {base!r}")
    *_, row = tool.lines(root=tmp_path)
    assert row.startswith("| [small_shapes](../configs/few/small_shapes.py) | shapes | 3 | ")
    model = tool.MODELS.build(tool.Config.fromfile(family / "small_shapes.py").model)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert row.endswith(f" | {count / 1e6:.1f} | - |")


def test_unknown_arguments_are_refused() -> None:
    result = subprocess.run([sys.executable, TOOL, "--nothing"], capture_output=True, text=True)
    assert result.returncode == 2 and "unrecognized arguments" in result.stderr

"""The measurement of DAT, and what was promised of its memory."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("mmcv.ops")

from mmdeform.models import DAT

from ..conftest import has_kernels

TOOL = Path(__file__).parents[2] / "tools" / "benchmark_dat.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_dat", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_report(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    tool.main(["--size", "64", "50", "--repeats", "1", "--version", "pp"])
    title, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("DAT pp tiny, 1 x 3 x 64 x 50, cpu")
    assert [row.split()[0] for row in rows] == ["auto", "reference"]
    assert all(float(row.split()[1]) > 0 for row in rows)


@pytest.mark.slow
def test_an_image_of_a_detector_takes_less_than_2_gb(tool: ModuleType) -> None:
    if not has_kernels("cpu"):
        pytest.skip("needs the compiled cpu library")
    peak = tool.peak_bytes(DAT("tiny", "v1", backend="fused").eval(), torch.randn(1, 3, 800, 1333))
    if peak is None:
        pytest.skip("this system does not tell the high-water mark of memory")
    assert 0.1e9 < peak < 1e9  # with all logits of a layer at once it is 3e9

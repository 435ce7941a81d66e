"""The operator tests on CPU tensors, computed by the CUDA kernels in the emulator."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .build import ROOT, build


@pytest.fixture(scope="module")
def library() -> Path:
    return build()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2], ids=["in-order", "shuffled-1", "shuffled-2"])
def test_operators(library: Path, seed: int) -> None:
    # Gradcheck calls a kernel thousands of times and takes other paths no more than once.
    selection = "not notices" if seed == 0 else "not gradcheck"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops"]
        + ["-m", "emulated and not cuda", "-k", selection],
        cwd=ROOT,
        env=os.environ
        | {
            "MMDEFORM_CPU_LIBRARY": str(library),
            "MMDEFORM_REQUIRE_EXT": "1",
            "MMDEFORM_EMULATION_SEED": str(seed),
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) > 100, result.stdout[-2000:]

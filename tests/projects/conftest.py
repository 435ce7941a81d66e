"""The package as it is installed, not as it is in a clone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH into which a wheel of this source was unpacked."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--no-build-isolation", "--no-deps", "--wheel-dir", folder]
    result = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, ROOT],
        env={**os.environ, "MMDEFORM_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    shutil.unpack_archive(next(folder.glob("*.whl")), folder, "zip")
    return folder

"""Fixtures shared by all tests."""

import sys
from collections.abc import Iterator

import pytest
import torch

from mmdeform.ops import _library


def pytest_report_header() -> list[str]:
    lines = []
    for device_type, status in _library.status().items():
        state = f"{status.path} ({status.capability})" if status.loaded else "not loaded"
        lines.append(f"mmdeform {device_type} library: {state}")
    return lines


def has_kernels(device_type: str) -> bool:
    """True if the compiled library of ``device_type`` is loaded."""
    status = _library.status().get(device_type)
    return status is not None and status.loaded


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Runs a test on the CPU and, marked ``cuda``, on a GPU with the CUDA library."""
    # A mark inherited by mistake would deselect a test on the CPU without a word.
    assert (request.param == "cuda") == (request.node.get_closest_marker("cuda") is not None)
    if request.param == "cuda":
        request.getfixturevalue("cuda")
    return request.param


@pytest.fixture
def cuda() -> str:
    """The device ``cuda``; skips without a GPU and the CUDA library. Mark the test ``cuda``."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU and a CUDA build of torch")
    if not has_kernels("cuda"):
        pytest.skip("needs the CUDA library: MMDEFORM_CUDA=1 pip install -e .")
    return "cuda"


@pytest.fixture
def kernel_device(device: str) -> str:
    """As ``device``, for what only compiled kernels promise; skips where they are not built."""
    if not has_kernels(device):
        pytest.skip(f"needs the compiled {device} library")
    return device


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def stock_mmcv() -> None:
    """Every test starts with mmcv's own functions, whatever was imported before."""
    accelerate = sys.modules.get("mmdeform.accelerate")
    if accelerate is not None:
        accelerate.disable()


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills every ``torch.empty``, also from C++, with NaN; sets the deterministic flag."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs a test with one and with two threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)

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


def environment(library: Path, seed: int = 0) -> dict[str, str]:
    return os.environ | {
        "MMDEFORM_CPU_LIBRARY": str(library),
        "MMDEFORM_REQUIRE_EXT": "1",
        "MMDEFORM_EMULATION_SEED": str(seed),
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2], ids=["in-order", "shuffled-1", "shuffled-2"])
def test_operators(library: Path, seed: int) -> None:
    # Gradcheck calls a kernel thousands of times and takes other paths no more than once.
    selection = "not notices" if seed == 0 else "not gradcheck"
    arguments = ["-q", "-p", "no:cacheprovider", "-m", "emulated and not cuda", "-k", selection]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "tests/ops"],
        cwd=ROOT,
        env=environment(library, seed),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) > 100, result.stdout[-2000:]


# Prints for each operator whether the gradients of one fp32 backward are bitwise equal in five
# orders of threads, first with deterministic=False, then with True.
REPEATABILITY = """
import os
import torch
from tests.ops import (
    test_dat_attn, test_dcnv3, test_dcnv4, test_deform_conv2d, test_deform_ps_roi_pool,
    test_deform_roi_pool, test_ms_deform_attn,
)

for module in (test_deform_conv2d, test_ms_deform_attn, test_dcnv3, test_dcnv4,
               test_deform_roi_pool, test_deform_ps_roi_pool, test_dat_attn):
    contract = module.TestContract()
    torch.manual_seed(0)
    arguments = {
        key: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in contract.cases["asymmetric"].make().items()
    }
    backward = getattr(torch.ops.mmdeform, contract.name + "_backward")
    grad_output = contract.grad_output(arguments)
    for deterministic in (False, True):
        results = []
        for seed in range(5):
            os.environ["MMDEFORM_EMULATION_SEED"] = str(seed)
            results.append(
                backward(*contract.backward_arguments(grad_output, arguments, deterministic))
            )
        print(all(a.equal(b) for other in results for a, b in zip(other, results[0])))
"""


def test_deterministic_gradients_do_not_depend_on_the_order(library: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", REPEATABILITY],
        cwd=ROOT,
        env=environment(library),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    # The last, dat_attn, adds nothing by atomics.
    assert result.stdout.split() == ["False", "True"] * 6 + ["True", "True"]


WIDE_HEADS = """
import torch
from mmdeform.ops import dat_attn

query, key = torch.zeros(1, 1, 257, 2, 3), torch.zeros(1, 1, 257, 5)
dat_attn(query, key, key, torch.zeros(1, 1, 5, 2), torch.zeros(1, 3, 3))
"""


def test_limits_of_a_kernel_are_errors(library: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", WIDE_HEADS],
        cwd=ROOT,
        env=environment(library),
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    message = "key: expected at most 256 channels per head, got shape (1, 1, 257, 5)"
    assert message in result.stderr

"""The emulator itself: what it computes, and which faults of a kernel it must show."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from .build import HERE, build, sanitizer_environment

KERNELS = HERE / "emulator_kernels.cu"


def build_kernels(sanitize: bool = False) -> str:
    return str(build([KERNELS], "emulator_kernels", sanitize=sanitize, link_torch=False))


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    library = ctypes.CDLL(build_kernels())
    for name in ("block_sum", "left_neighbour", "warp_operations", "divergent_barrier"):
        getattr(library, name).restype = ctypes.c_char_p
    for name in ("divergent_shuffle", "absent_lane", "unwritten_shared", "too_much_shared", "trap"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


@pytest.fixture(params=[0, 1, 2], ids=["in-order", "shuffled-1", "shuffled-2"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setenv("MMDEFORM_EMULATION_SEED", str(request.param))
    yield request.param


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def zeros(*size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32)


@pytest.mark.usefixtures("order")
def test_shared_memory_shuffles_barriers_and_atomics(library: ctypes.CDLL) -> None:
    values = torch.arange(1000.0)
    total = torch.zeros(1)
    assert library.block_sum(pointer(values), len(values), pointer(total)) is None
    assert total == values.sum()


@pytest.mark.usefixtures("order")
def test_warp_operations(library: ctypes.CDLL) -> None:
    output = zeros(64, 7)
    assert library.warp_operations(pointer(output)) is None
    assert output[:32].equal(output[32:])
    lane = torch.arange(32)
    segment = lane // 8 * 8
    expected = [
        torch.full((32,), 105),
        100 + segment + 1,
        100 + (lane - 3).where(lane - 3 >= segment, lane),
        100 + (lane + 3).where(lane + 3 < segment + 8, lane),
        100 + (lane ^ 6),
        torch.full((32,), sum(1 << i for i in range(0, 32, 3))),
        (100 + (lane ^ 1)).where(lane < 16, 1),
    ]
    for column, values in enumerate(expected):
        assert output[:32, column].equal(values.int()), f"column {column}"


def left_neighbours(library: ctypes.CDLL, barrier: bool) -> bool:
    output = zeros(96)
    assert library.left_neighbour(pointer(output), len(output), barrier) is None
    return output[1:].equal(torch.arange(95).int())


@pytest.mark.usefixtures("order")
def test_a_barrier_orders_accesses(library: ctypes.CDLL) -> None:
    assert left_neighbours(library, barrier=True)


def test_a_missing_barrier_shows_in_shuffled_order(library: ctypes.CDLL, order: int) -> None:
    # In order the left neighbour always comes first: the fault stays hidden.
    assert left_neighbours(library, barrier=False) == (order == 0)


@pytest.mark.usefixtures("order")
def test_shared_memory_is_poisoned_for_every_block(library: ctypes.CDLL) -> None:
    output = torch.zeros(64)
    assert library.unwritten_shared(pointer(output)) is None
    assert output.isnan().all()


@pytest.mark.usefixtures("order")
def test_divergent_barrier_is_an_error(library: ctypes.CDLL) -> None:
    message = library.divergent_barrier().decode()
    assert "divergent_barrier_kernel" in message
    assert "40 wait at __syncthreads, 24 have exited" in message


@pytest.mark.usefixtures("order")
def test_divergent_shuffle_is_an_error(library: ctypes.CDLL) -> None:
    output = zeros(32)
    message = library.divergent_shuffle(pointer(output)).decode()
    assert "divergent_shuffle_kernel" in message
    assert "waits at __shfl_xor_sync with mask 0xffffffff" in message


@pytest.mark.usefixtures("order")
def test_reading_an_absent_lane_is_an_error(library: ctypes.CDLL) -> None:
    output = zeros(32)
    message = library.absent_lane(pointer(output)).decode()
    assert "absent_lane_kernel" in message and "reads lane 20" in message


@pytest.mark.usefixtures("order")
def test_trap_is_an_error_and_the_next_kernel_runs(library: ctypes.CDLL) -> None:
    assert b"__trap" in library.trap()
    assert left_neighbours(library, barrier=True)


def test_invalid_launch_is_an_error(library: ctypes.CDLL) -> None:
    output = zeros(32)
    message = library.too_much_shared(pointer(output)).decode()
    assert "write_shared_kernel" in message and "50176 bytes of shared memory" in message


@pytest.mark.parametrize(
    ("call", "sound"),
    [
        ("write_global(100, 100)", True),
        ("write_global(100, 101)", False),
        ("write_shared(100, 99)", True),
        ("write_shared(100, 100)", False),
    ],
)
def test_address_sanitizer_sees_accesses_out_of_bounds(call: str, sound: bool) -> None:
    code = f"import ctypes; ctypes.CDLL({build_kernels(sanitize=True)!r}).{call}"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | sanitizer_environment(),
        capture_output=True,
        text=True,
    )
    if sound:
        assert result.returncode == 0, result.stderr
        return
    assert result.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr
    assert f"{call.split('(')[0]}_kernel" in result.stderr

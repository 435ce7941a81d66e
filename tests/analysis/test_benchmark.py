"""What the benchmark measures with: errors, clocks, memory, and the registered cases."""

import dataclasses
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("mmengine")  # of mmdeform.analysis

from mmdeform.analysis import benchmark
from mmdeform.analysis.benchmark import check, measure
from mmdeform.analysis.benchmark.dcnv3 import depthwise_conv2d
from mmdeform.analysis.benchmark.deform_conv2d import grid_sample_composition
from mmdeform.analysis.benchmark.deform_conv2d import make_case as make_conv_case


def test_comparing_with_zeros_is_an_error() -> None:
    zeros = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="grad_x: the reference must be finite and not zero"):
        check.compare({"grad_x": zeros}, {"grad_x": zeros})


def test_errors_are_relative_to_element_and_scale() -> None:
    expected = torch.tensor([3.0, -4.0, 0.0, 0.0])  # rms 2.5
    errors = check.compare({"x": expected + torch.tensor([0, 0.65, 0, 0])}, {"x": expected})
    assert errors["x"].worst == pytest.approx(0.1)
    assert errors["x"].norm == pytest.approx(0.325 / 2.5)


def test_samples_are_interleaved() -> None:
    order = []

    class Clock:
        def prepare(self, name: str, call: Callable) -> None:
            call()

        def sample(self, name: str, call: Callable) -> tuple[float, None]:
            call()
            return len(order), None

    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    samples = measure.interleave(calls, 3, Clock())
    assert order == ["a", "b"] * 4
    assert samples == {
        "a": [(3, None), (5, None), (7, None)],
        "b": [(4, None), (6, None), (8, None)],
    }


def test_short_calls_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MIN_SAMPLE", 1e9)
    calls = []
    clock = measure.CpuClock()
    clock.prepare("a", lambda: calls.append(1))
    warm_up = len(calls)
    seconds, host = clock.sample("a", lambda: calls.append(1))
    assert len(calls) - warm_up == 1000
    assert seconds > 0 and host is None


def allocate_in_thread() -> None:
    thread = threading.Thread(target=lambda: torch.ones(8 << 20).sum())
    thread.start()
    thread.join()


MIB = 2**20


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: [torch.ones(8 * MIB)], 0),
        (lambda: [torch.ones(8 * MIB).sum()], 32 * MIB),
        (lambda: [torch.ones(8 * MIB).add(1)], 32 * MIB),
        (lambda: [torch.ones(2 * MIB).logsumexp(0)], 16 * MIB),  # both buffers made in C++
        (lambda: allocate_in_thread() or [], 32 * MIB),
    ],
    ids=["result-only", "freed", "freed-beside-result", "inside-an-operator", "other-thread"],
)
def test_extra_memory(call: Callable[[], list[Tensor]], expected: int) -> None:
    call()
    measured = measure.extra_bytes(call, torch.device("cpu"))
    if measured is None:
        pytest.skip("this system does not tell the high-water mark of memory")
    assert measured == pytest.approx(expected, abs=MIB)


def test_column_buffers_are_seen() -> None:
    case = make_conv_case("larger", 64, 60, 80)
    inputs = {
        name: value.float() if isinstance(value, Tensor) else value
        for name, value in case.make(1, torch.Generator().manual_seed(0)).items()
    }
    columns = 64 * 9 * 60 * 80 * 4
    grid_sample_composition(**inputs)
    measured = measure.extra_bytes(lambda: [grid_sample_composition(**inputs)], torch.device("cpu"))
    if measured is None:
        pytest.skip("this system does not tell the high-water mark of memory")
    assert measured > 0.95 * columns


def test_selection() -> None:
    operator = dataclasses.replace(
        benchmark.OPERATORS["deform_conv2d"],
        cases=(
            make_conv_case("a", 8, 6, 9, batches={"cpu": (1, 2)}),
            make_conv_case("b", 8, 6, 9, batches={"cuda": (4,)}),
            make_conv_case("c", 8, 6, 9),
        ),
    )

    def names(*args: object, **kwargs: object) -> list[tuple[str, int]]:
        return [(case.name, b) for _, case, b in benchmark.select([operator], *args, **kwargs)]

    assert names("cpu") == [("a", 1), ("a", 2)]
    assert names("cuda") == [("b", 4)]
    assert names("cpu", batches=[3]) == [("a", 3)]
    assert names("cpu", sweep=True) == [("a", 1), ("a", 2), ("b", 1), ("c", 1)]
    assert names("cpu", filters=["c", "b"]) == [("b", 1), ("c", 1)]


def test_registered_shapes() -> None:
    generator = torch.Generator().manual_seed(0)
    for operator in benchmark.OPERATORS.values():
        assert hasattr(torch.ops.mmdeform, operator.name)
        names = [case.name for case in operator.cases]
        assert len(set(names)) == len(names)
        for device in ("cpu", "cuda"):
            assert list(benchmark.select([operator], device))
    cases = {case.name: case for case in benchmark.OPERATORS["ms_deform_attn"].cases}
    small = cases["encoder-50x84-within2px"].make(1, generator)
    assert small["value"].shape == (1, 5600, 8, 32)
    sums = small["attention_weights"].sum((3, 4))
    torch.testing.assert_close(sums, torch.ones_like(sums))
    pixels = small["sampling_locations"] * small["spatial_shapes"].flip(1)[:, None] - 0.5
    finest = pixels[0, :4200, :, 0].unflatten(0, (50, 84))  # of its own queries, (50, 84, M, P, 2)
    x, y = torch.arange(84)[None, :, None, None], torch.arange(50)[:, None, None, None]
    distance = (finest - torch.stack(torch.broadcast_tensors(x, y), dim=-1)).abs()
    assert 1.9 < distance.max() <= 2.02
    large = cases["encoder-100x167-uniform"].make(1, generator)
    assert large["sampling_locations"].shape == (1, 22223, 8, 4, 4, 2)


def test_conv2d_is_the_yardstick_of_the_same_shape() -> None:
    conv = next(p for p in benchmark.OPERATORS["deform_conv2d"].peers if p.name == "F.conv2d")
    inputs = make_conv_case("", 4, 7, 5, stride=2).make(1, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        conv.load("cpu")(**inputs), F.conv2d(inputs["input"], inputs["weight"], stride=2, padding=1)
    )


def test_depthwise_convolution_is_the_yardstick_of_dcn() -> None:
    operators = [benchmark.OPERATORS[name] for name in ("dcnv3", "dcnv4")]
    inputs = operators[0].cases[3].make(1, torch.Generator().manual_seed(0))
    input = inputs["input"]
    assert input.shape == (1, 7, 7, 512)
    sums = F.avg_pool2d(input.permute(0, 3, 1, 2), 3, 1, 1, divisor_override=1)
    torch.testing.assert_close(depthwise_conv2d(**inputs), sums.permute(0, 2, 3, 1))
    for operator in operators:
        peer = next(peer for peer in operator.peers if peer.name == "F.conv2d")
        assert not peer.same_function

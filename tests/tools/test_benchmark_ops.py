"""The benchmark refuses what is wrong, names who is absent, and shows who wins."""

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich")
pytest.importorskip("mmengine")  # of mmdeform.analysis

from rich.console import Console

from mmdeform.analysis import benchmark
from mmdeform.analysis.benchmark import Operator, Peer, Settings, check, measure, runner
from mmdeform.analysis.benchmark.case import Absent
from mmdeform.analysis.benchmark.dat_attn import make_case as make_dat_case
from mmdeform.analysis.benchmark.dat_attn import table_places
from mmdeform.analysis.benchmark.dcnv3 import make_case as make_dcnv3_case
from mmdeform.analysis.benchmark.dcnv4 import make_case as make_dcnv4_case
from mmdeform.analysis.benchmark.deform_conv2d import make_case as make_conv_case
from mmdeform.analysis.benchmark.deform_ps_roi_pool import make_case as make_ps_roi_case
from mmdeform.analysis.benchmark.deform_roi_pool import make_case as make_roi_case
from mmdeform.analysis.benchmark.ms_deform_attn import gaussian
from mmdeform.analysis.benchmark.ms_deform_attn import make_case as make_attention_case

TOOL = Path(__file__).parents[2] / "tools" / "benchmark_ops.py"
BATCHES = {"cpu": (2,), "cuda": (2,)}
TINY = {
    "dat_attn": (
        make_dat_case(
            "stride-2", (3, 4), (3, 5), (5, 7), heads=4, groups=2, channels=8, batches=BATCHES
        ),
        make_dat_case(
            "v1",
            (4, 3),
            (2, 3),
            (7, 5),
            heads=2,
            groups=1,
            channels=8,
            align_corners=False,
            batches=BATCHES,
        ),
    ),
    "dcnv3": (
        make_dcnv3_case("groups", 6, 12, group_channels=4, batches=BATCHES),
        make_dcnv3_case("one-group", 5, 8, group_channels=8, batches=BATCHES),
    ),
    "dcnv4": (
        make_dcnv4_case("groups", 6, 12, group_channels=4, batches=BATCHES),
        make_dcnv4_case("one-group", 5, 8, group_channels=8, batches=BATCHES),
    ),
    "deform_conv2d": (
        make_conv_case("v2", 8, 6, 9, deform_groups=2, dilation=2, batches=BATCHES),
        make_conv_case("v1", 8, 6, 9, modulated=False, stride=2, batches=BATCHES),
    ),
    "deform_ps_roi_pool": (
        make_ps_roi_case("classes", 30, 40, output_dim=6, classes=3, rois=5, batches=BATCHES),
        make_ps_roi_case("boxes", 30, 40, output_dim=4, classes=1, rois=5, batches=BATCHES),
    ),
    "deform_roi_pool": (
        make_roi_case("modulated", 30, 40, 4, channels=8, rois=5, mask=True, batches=BATCHES),
        make_roi_case("plain", 30, 40, 4, channels=8, rois=5, offset=False, batches=BATCHES),
    ),
    "ms_deform_attn": (
        make_attention_case(
            "encoder", ((6, 9), (3, 4)), spread=gaussian(2), heads=2, channels=8, batches=BATCHES
        ),
        make_attention_case(
            "decoder", ((6, 9), (3, 4)), queries=5, heads=2, channels=8, batches=BATCHES
        ),
    ),
}
GRADIENTS = [
    (name, field)
    for name, fields in {
        "dat_attn": ("output", "query", "key", "value", "positions", "table"),
        "dcnv3": ("output", "input", "offset", "mask"),
        "dcnv4": ("output", "input", "offset_mask"),
        "deform_conv2d": ("output", "input", "offset", "mask", "weight"),
        "deform_ps_roi_pool": ("output", "input", "offset"),
        "deform_roi_pool": ("output", "input", "offset", "mask"),
        "ms_deform_attn": ("output", "value", "sampling_locations", "attention_weights"),
    }.items()
    for field in fields
]


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> dict[str, Operator]:
    """The registered operators, each with tiny cases in place of its own."""
    for name, cases in TINY.items():
        tiny = dataclasses.replace(benchmark.OPERATORS[name], cases=cases)
        monkeypatch.setitem(benchmark.OPERATORS, name, tiny)
    monkeypatch.setattr(measure, "MIN_SAMPLE", 0.0)
    return benchmark.OPERATORS


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_ops", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(dtype: torch.dtype = torch.float32, **changes: object) -> Settings:
    return dataclasses.replace(Settings(torch.device("cpu"), dtype, repeats=1), **changes)


def run_tiny(operator: Operator, case: int = 0, **changes: object) -> benchmark.CaseResult:
    return benchmark.run_case(operator, operator.cases[case], 2, settings(**changes))


class ScaleGradient(torch.autograd.Function):
    """The identity with a gradient that is one percent too large."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 1.01 * grad


def break_field(function: Callable[..., Tensor], field: str) -> Callable[..., Tensor]:
    """An operator whose output, or whose gradient of one input, is one percent too large."""

    def broken(**inputs: object) -> Tensor:
        if field == "output":
            output = function(**inputs)
            return output + 0.01 * output.detach()
        return function(**{**inputs, field: ScaleGradient.apply(inputs[field])})

    return broken


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", TINY)
def test_operators_are_reported(operators: dict[str, Operator], name: str, dtype: str) -> None:
    for case in range(len(operators[name].cases)):
        result = run_tiny(operators[name], case, dtype=getattr(torch, dtype), peers=["reference"])
        assert result.refused is None
        assert [row.name for row in result.rows] == ["mmdeform", "reference"]
        for row in result.rows:
            assert row.exact and row.dtype == dtype
            assert len(row.forward.times_ms) == len(row.forward_backward.times_ms) == 1
            assert 0 < row.forward.min_ms <= row.forward.median_ms


@pytest.mark.parametrize("name", TINY)
def test_peers_compute_the_same(operators: dict[str, Operator], name: str) -> None:
    for case in range(len(operators[name].cases)):
        result = run_tiny(operators[name], case, dtype=torch.float64)
        names = {peer.name for peer in operators[name].peers}
        assert {"grid_sample", "reference"} & names <= {row.name for row in result.rows}
        for row in result.rows:
            assert row.exact, row
        measured = {row.name for row in result.rows} - {"mmdeform"}
        assert measured | set(result.absent) == names


@pytest.mark.parametrize(("name", "field"), GRADIENTS)
def test_a_wrong_operator_is_refused(operators: dict[str, Operator], name: str, field: str) -> None:
    broken = break_field(operators[name].function, field)
    result = run_tiny(dataclasses.replace(operators[name], function=broken))
    named = "output" if field == "output" else f"grad_{field}"
    assert result.refused.startswith(f"differs from the reference in fp64: {named} by ")
    assert "," not in result.refused  # nothing else is blamed
    assert result.rows == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda output: output.mul(0.0).div(0.0), "output by inf"),
        (lambda output: output[:1], "output: expected"),
        (lambda output: output.detach(), "the call fails: element 0 of tensors does not require"),
    ],
    ids=["nan", "shape", "no-gradient"],
)
def test_a_broken_operator_is_refused(
    operators: dict[str, Operator], change: Callable[[Tensor], Tensor], reason: str
) -> None:
    operator = operators["ms_deform_attn"]
    function = operator.function
    broken = dataclasses.replace(operator, function=lambda **inputs: change(function(**inputs)))
    result = run_tiny(broken)
    assert reason in result.refused
    assert result.rows == []


@pytest.mark.parametrize("name", TINY)
def test_pieces_of_the_reference_make_the_whole(operators: dict[str, Operator], name: str) -> None:
    operator = operators[name]
    inputs = operator.cases[0].make(2, torch.Generator().manual_seed(0))
    output = operator.reference(**inputs)
    covered = torch.zeros_like(output)
    for _, place in operator.split(inputs):
        covered[place] += 1
    assert covered.eq(1).all()
    grad_output = torch.randn_like(output)
    whole = check.call_with_gradients(operator.reference, inputs, grad_output, operator.constants)
    pieces = check.reference_results(operator, inputs, grad_output)
    torch.testing.assert_close(pieces, whole, rtol=1e-10, atol=1e-10)


def roi_positions(
    rois: Tensor, offset: Tensor, spatial_scale: float, gamma: float, **_: object
) -> Tensor:
    """Positions (x, y) of two samples per bin and axis, shape (R, 2, 7, 7, 2)."""
    start, end = (rois[:, 1:] * spatial_scale - 0.5).split(2, dim=1)
    bin_size = ((end - start) / 7)[:, :, None, None]
    bins = torch.arange(7.0, dtype=torch.float64)
    steps = torch.stack(torch.meshgrid(bins, bins, indexing="xy"))  # (2, 7, 7): (x, y)
    first = start[:, :, None, None] + (steps + 0.25 + 0.7 * offset) * bin_size
    return torch.stack((first, first + bin_size / 2), dim=-1)


def ps_roi_positions(
    rois: Tensor, offset: Tensor, spatial_scale: float, trans_std: float, **_: object
) -> Tensor:
    """Positions (x, y) of the first samples of all bins, shape (R, K, 2, 7, 7)."""
    start, end = rois[:, 1:].split(2, dim=1)
    size = (end + 1 - start)[:, None, :, None, None] * spatial_scale
    bins = torch.arange(7.0, dtype=torch.float64)
    steps = torch.stack(torch.meshgrid(bins, bins, indexing="xy"))  # (2, 7, 7): (x, y)
    begin = start[:, None, :, None, None] * spatial_scale - 0.5
    return begin + (steps / 7 + trans_std * offset.unflatten(1, (-1, 2))) * size


@pytest.mark.parametrize("name", TINY)
def test_samples_stay_off_integers(operators: dict[str, Operator], name: str) -> None:
    inputs = operators[name].cases[0].make(1, torch.Generator().manual_seed(0))
    if name in ("dcnv3", "deform_conv2d"):
        positions = inputs["offset"]
    elif name == "dcnv4":
        positions = inputs["offset_mask"][..., :81].unflatten(3, (3, 27))[..., :18]
    elif name == "dat_attn":
        axes = [table_places(inputs["positions"][..., axis], size, cells, True)
                for axis, (size, cells) in enumerate(((3, 5), (4, 7)))]  # fmt: skip
        positions = torch.cat(axes, -1)
    elif name == "deform_roi_pool":
        positions = roi_positions(**inputs)
    elif name == "deform_ps_roi_pool":
        positions = ps_roi_positions(**inputs)
    else:
        sizes = inputs["spatial_shapes"].flip(1)[:, None]
        positions = inputs["sampling_locations"] * sizes - 0.5
    distance = (positions - positions.round()).abs()
    assert distance.min() > 0.0099
    assert distance.max() > 0.37  # and are spread over pixels


def test_samples_are_counted(operators: dict[str, Operator]) -> None:
    expected = {
        # 2 images, 8 channels, 9 taps, 6 x 9 outputs
        ("deform_conv2d", 0): 2 * 8 * 9 * 54,
        # 2 images, 5 queries, 2 heads, 2 x 4 points of 8 channels
        ("ms_deform_attn", 1): 2 * 5 * 2 * 8 * 8,
        # 2 images, 6 x 6 outputs, 9 taps, 12 channels
        ("dcnv3", 0): 2 * 36 * 9 * 12,
        ("dcnv4", 0): 2 * 36 * 9 * 12,
        # 2 images, 4 heads, 3 x 4 queries, 15 keys
        ("dat_attn", 0): 2 * 4 * 12 * 15,
    }
    for (name, case), samples in expected.items():
        inputs = operators[name].cases[case].make(2, torch.Generator())
        assert operators[name].samples(inputs) == samples


def with_peers(operator: Operator, *peers: Peer) -> Operator:
    return dataclasses.replace(operator, peers=peers)


def test_absent_peers_are_named(
    operators: dict[str, Operator], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    result = run_tiny(operators["deform_conv2d"], peers=["torchvision"])
    assert result.absent == {"torchvision": "torchvision is not installed"}


def test_peers_that_fail_or_do_not_fit_are_absent(operators: dict[str, Operator]) -> None:
    def load_missing(device_type: str) -> Callable[..., Tensor]:
        raise Absent(f"not for {device_type}")

    def load_failing(device_type: str) -> Callable[..., Tensor]:
        def fail(**inputs: object) -> Tensor:
            raise RuntimeError("no kernel image\nand more lines")

        return fail

    operator = operators["ms_deform_attn"]
    result = run_tiny(
        with_peers(
            operator,
            Peer("missing", load_missing),
            Peer("failing", load_failing),
            Peer("huge", lambda _: operator.reference, copies=10**9),
            Peer("wrong", lambda _: lambda **inputs: 2 * operator.reference(**inputs)),
        )
    )
    assert [row.name for row in result.rows] == ["mmdeform"]
    assert result.absent["missing"] == "not for cpu"
    assert result.absent["failing"] == "float32 fails: no kernel image"
    assert result.absent["huge"].startswith("would need about ")
    assert result.absent["wrong"] == "wrong in float32: output differs from fp64 by 100%"


def test_an_inexact_peer_is_shown_as_such(operators: dict[str, Operator], tool: ModuleType) -> None:
    operator = operators["ms_deform_attn"]
    broken = break_field(operator.reference, "value")
    result = run_tiny(with_peers(operator, Peer("inexact", lambda _: broken)))
    row = result.rows[1]
    assert not row.exact
    assert row.error["grad_value"].worst > result.tolerance > row.error["output"].worst
    assert tool.error_text(result, row).plain.endswith("(grad_value)")
    assert "red" in str(tool.error_text(result, row).style)


def test_a_peer_without_bf16_runs_in_fp16(operators: dict[str, Operator]) -> None:
    operator = operators["ms_deform_attn"]

    def load(device_type: str) -> Callable[..., Tensor]:
        def only_half(**inputs: Tensor) -> Tensor:
            for name in ("value", "sampling_locations", "attention_weights"):
                if inputs[name].dtype != torch.float16:
                    raise RuntimeError("not implemented for 'BFloat16'")
            return operator.reference(**inputs)

        return only_half

    result = run_tiny(with_peers(operator, Peer("half", load)), dtype=torch.bfloat16)
    assert [(row.name, row.dtype) for row in result.rows] == [
        ("mmdeform", "bfloat16"),
        ("half", "float16"),
    ]
    assert result.rows[1].exact


def test_a_yardstick_is_not_compared(operators: dict[str, Operator]) -> None:
    result = run_tiny(operators["deform_conv2d"], peers=["F.conv2d"])
    row = result.rows[1]
    assert (row.name, row.kind, row.error) == ("F.conv2d", "yardstick", None)
    assert row.forward_backward is not None


def test_tool_writes_table_and_json(
    operators: dict[str, Operator],
    tool: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    path = tmp_path / "out" / "results.json"
    arguments = ["--repeats", "3", "--dtype", "fp32", "bf16", "--json", str(path)]
    assert tool.main([*arguments, "--peers", "reference", "F.conv2d"]) == 0
    printed = capsys.readouterr().out
    for text in ("deform_conv2d  v2  batch 2", "ms_deform_attn  decoder", "bfloat16", "F.conv2d"):
        assert text in printed
    report = json.loads(path.read_text())
    assert report["format"] == 1
    environment = report["environment"]
    assert environment["torch"] == torch.__version__
    assert {"commit", "command", "packages", "libraries", "cpu", "threads"} <= set(environment)
    assert "torchvision" in environment["packages"]
    assert len(report["results"]) == 2 * sum(len(cases) for cases in TINY.values())
    for result in report["results"]:
        assert result["refused"] is None and result["batch"] == 2 and result["device"] == "cpu"
        assert result["shapes"]
        ours, *others = result["rows"]
        assert ours["name"] == "mmdeform" and ours["kind"] in ("kernel", "reference")
        for mode in ("forward", "forward_backward"):
            for row in (ours, *others):
                timing = row[mode]
                assert len(timing["times_ms"]) == 3
                assert timing["median_ms"] == sorted(timing["times_ms"])[1]
                assert timing["min_ms"] == min(timing["times_ms"])
                ratio = timing["median_ms"] / ours[mode]["median_ms"]
                assert timing["relative"] == pytest.approx(ratio)
        assert all(error["worst"] <= result["tolerance"] for error in ours["error"].values())


def test_tool_refuses_and_exits_with_one(
    operators: dict[str, Operator],
    tool: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operator = operators["deform_conv2d"]
    broken = dataclasses.replace(operator, function=break_field(operator.function, "weight"))
    monkeypatch.setitem(benchmark.OPERATORS, "deform_conv2d", broken)
    path = tmp_path / "results.json"
    arguments = ["--filter", "v2", "encoder", "--repeats", "1", "--peers", "reference"]
    assert tool.main([*arguments, "--json", str(path)]) == 1
    refused, reported = json.loads(path.read_text())["results"]
    assert "grad_weight by" in refused["refused"] and refused["rows"] == []
    assert reported["refused"] is None and len(reported["rows"]) == 2
    assert "REFUSED  deform_conv2d  v2" in capsys.readouterr().out


def test_table_shows_where_a_peer_wins(tool: ModuleType) -> None:
    def timing(milliseconds: float) -> measure.Timing:
        return measure.Timing([milliseconds], None, None)

    rows = [
        runner.Row(name, kind, "float32", None, True, timing(forward), timing(10.0))
        for name, kind, forward in (
            ("mmdeform", "kernel", 10.0),
            ("slow", "peer", 45.0),
            ("quick", "peer", 8.0),
            ("conv", "yardstick", 5.0),
        )
    ]
    result = runner.CaseResult("op", "case", "cpu", "float32", 1, {}, 1e-4, rows=rows)
    console = Console(width=tool.WIDTH, record=True)
    console.print(tool.make_table(result))
    lines = {line.split()[0]: line for line in console.export_text().splitlines() if line.strip()}
    assert "4.50" in lines["slow"] and "faster" not in lines["slow"]
    assert "0.80 faster" in lines["quick"]
    assert "0.50" in lines["conv"] and "faster" not in lines["conv"]
    result.absent["other"] = "not installed"
    refused = dataclasses.replace(result, rows=[], refused="output by 1")
    markdown = tool.make_markdown([result, refused]).splitlines()
    assert "| quick | 8 (8) | 0.80 faster | ? | 10 (10) | 1.00 | ? | not compared |" in markdown
    assert "Absent: other: not installed" in markdown
    assert "Refused: output by 1" in markdown
    assert len({line.count("|") for line in markdown if line.startswith("|")}) == 1


def test_tool_lists_cases_and_rejects_an_empty_choice(
    tool: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    assert tool.main(["--list"]) == 0
    assert "deform_conv2d/v2-c4-256x50x84 batch 1\n" in capsys.readouterr().out
    assert tool.main(["--filter", "no such case"]) == 2
    assert "no case fits" in capsys.readouterr().err


def test_settings_of_torch_are_applied_and_recorded(
    operators: dict[str, Operator], tool: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    arguments = ["--filter", "decoder", "--repeats", "1", "--peers", "--json", str(path)]
    threads = torch.get_num_threads()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        assert tool.main([*arguments, "--threads", "1", "--deterministic"]) == 0
        assert not torch.utils.deterministic.fill_uninitialized_memory  # it would be measured too
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill
    environment = json.loads(path.read_text())["environment"]
    assert environment["threads"] == 1 and environment["deterministic"]


@pytest.mark.cuda
def test_on_a_gpu(
    cuda: str, operators: dict[str, Operator], tool: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    arguments = ["--device", "cuda", "--repeats", "3", "--json", str(path)]
    assert tool.main([*arguments, "--dtype", "fp32", "fp16"]) == 0
    report = json.loads(path.read_text())
    assert report["environment"]["cuda"]["gpu"]
    for result in report["results"]:
        for row in result["rows"]:
            assert row["forward"]["host_ms"] > 0 and row["forward"]["median_ms"] > 0
            assert row["forward_backward"]["extra_bytes"] >= 0

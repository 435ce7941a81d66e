"""tools/ablate.py: what it prints and refuses, and a real training from the spec to the results."""

import csv
import importlib.util
import json
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("submitit")

from ..ablation.small import SPEC, write_base

ROOT = Path(__file__).parents[2]
FAKE = (sys.executable, str(ROOT / "tests/ablation/fake_train.py"))


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("ablate")


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small spec, in the working directory, that nothing real trains."""
    monkeypatch.chdir(tmp_path)
    write_base(tmp_path)
    (tmp_path / "small.yml").write_text(json.dumps(SPEC))
    return "small.yml"


def test_plan_prints_the_rows(
    tool: ModuleType, spec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["plan", spec, "--no-cost", "--seeds", "1", "2", "3"]) == 0
    output = capsys.readouterr().out
    assert "one (base)" in output and "two" in output
    assert "2 rows with 3 seeds: 6 runs, in work_dirs/ablations/small" in output
    assert not Path("work_dirs").exists()


def test_some_rows(tool: ModuleType, spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["plan", spec, "--no-cost", "--rows", "two"]) == 0
    output = capsys.readouterr().out
    assert "two" in output and "one" not in output and "1 rows with 2 seeds: 2 runs" in output
    with pytest.raises(SystemExit):
        tool.main(["plan", spec, "--no-cost", "--rows", "two", "tow"])
    error = capsys.readouterr().err
    assert "--rows: unknown row 'tow', did you mean 'two'? (known: one, two)" in error


def test_run_status_and_retry(
    tool: ModuleType,
    spec: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tool, "TRAIN", FAKE)
    handlers = []
    monkeypatch.setattr(tool.signal, "signal", lambda number, _: handlers.append(number))
    options = ["--no-cost", "--parallel", "2", "--seeds", "0"]
    assert tool.main(["run", spec, *options, "--cfg-options", "model.fails=True"]) == 1
    output = capsys.readouterr().out
    assert handlers == [signal.SIGINT, signal.SIGTERM]
    assert "2 failed" in output and "one, seed 0: exit code 1" in output
    assert "retry work_dirs/ablations/small" in output
    with pytest.raises(SystemExit):
        tool.main(["run", spec, *options])
    assert "holds other configs of one, two" in capsys.readouterr().err

    assert tool.main(["status", "work_dirs/ablations/small"]) == 0
    assert "2 failed" in capsys.readouterr().out
    Path("repaired").touch()
    assert tool.main(["retry", "work_dirs/ablations/small"]) == 0
    output = capsys.readouterr().out
    assert "again: one/seed_0, two/seed_0" in output and "2 finished" in output
    arguments = ["status", "work_dirs/ablations/small", "--out", "a/results.json"]
    assert tool.main(arguments) == 0
    assert "written to a/results.json" in capsys.readouterr().out
    report = json.loads(Path("a/results.json").read_text())
    assert (report["ablation"], report["metrics"]) == ("small", ["coco/bbox_mAP"])
    assert [run["status"] for run in report["runs"]] == ["finished", "finished"]
    assert len(report["runs"][1]["curves"]["loss"]) == 3


def test_interruption_says_how_to_go_on(
    tool: ModuleType,
    spec: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed = []

    def train_runs(*_: object) -> object:
        try:
            yield []
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    monkeypatch.setattr(tool, "train_runs", train_runs)
    monkeypatch.setattr(tool.signal, "signal", lambda *_: None)
    assert tool.main(["run", spec, "--no-cost"]) == 130
    output = capsys.readouterr().out
    assert "stopped. The same command goes on with work_dirs/ablations/small" in output
    assert closed == [True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "nothing.yml"], "nothing.yml: [Errno 2] No such file"),
        (["plan", "small.yml", "--base", "coco"], "base: expected one of '', got 'coco'"),
        (["plan", "small.yml", "--data", "no.yml"], "--data: [Errno 2] No such file"),
        (["plan", "small.yml", "--parallel", "0"], "--parallel: expected a positive number, got 0"),
        (["plan", "small.yml", "--cpu-threads", "0"], "--cpu-threads: expected a positive number"),
        (["plan", "small.yml", "--latency", "-1"], "--latency: expected a number of runs, got -1"),
        (["plan", "small.yml", "--seeds", "1", "1"], "--seeds: expected different ones"),
        (["plan", "small.yml", "--cfg-options", "modle.a=1"], "options: modle is no part of a con"),
        (["plan", "small.yml"], "row one: KeyError: 'Fake is not in the"),
        (["status", "nothing"], "nothing is no folder of an ablation"),
        (["retry", "nothing"], "nothing is no folder of an ablation"),
        (["run", "small.yml", "--no-cost", "--slurm"], "no Slurm on this machine"),
        ([], "the following arguments are required: command"),
    ],
)
def test_refuses(
    tool: ModuleType,
    spec: str,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tool.signal, "signal", lambda *_: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as error:
        tool.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_trains_detectors(
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two rows with the real train.py, on a data set that the spec does not know."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tool.signal, "signal", lambda *_: None)
    load_tool("make_shapes").make_shapes(
        tmp_path / "mine", train=2, val=1, size=64, seed=0, overwrite=False
    )
    (tmp_path / "mine.yml").write_text(
        "root: mine\nclasses: [disc, ring, pair, arc, cross]\n"
        "train: {annotations: train.json, images: train/}\n"
        "val: {annotations: val.json, images: val/}\n"
    )
    base = ROOT / "configs/dcnv2/faster-rcnn_r18_shapes.py"
    rule = dict(select="backbone.layer4.1.conv2", type="mmdeform.DCNv2")
    deformable = dict(type="mmdeform.Transplant", model="FasterRCNN", rules=[rule])
    overrides = {
        "train_cfg": dict(max_epochs=1, val_interval=1),
        "model.backbone.base_channels": 8,
        "model.neck.in_channels": [8, 16, 32, 64],
        "model.train_cfg.rpn_proposal.nms_pre": 20,
        "model.test_cfg.rpn.nms_pre": 20,
    }
    axes = dict(conv=dict(plain=None, mdconv=dict(model=deformable)))
    content = dict(name="tiny", base=str(base), overrides=overrides, axes=axes,
                   seeds=[7], metrics=["coco/bbox_mAP"])  # fmt: skip
    (tmp_path / "tiny.yml").write_text(json.dumps(content))
    arguments = ["run", "tiny.yml", "--data", "mine.yml", "--parallel", "2"]
    assert tool.main(arguments) == 0, capsys.readouterr().out
    output = capsys.readouterr().out
    assert "parameters (M)" in output and "2 finished" in output
    store = tool.Store("work_dirs/ablations/tiny_mine")
    plain, mdconv = store.results()
    assert plain.is_base and not mdconv.is_base
    assert plain.parameters < mdconv.parameters and 0 < plain.macs < mdconv.macs
    for result in (plain, mdconv):
        assert 0 <= result.metrics["coco/bbox_mAP_50"] <= 1 and result.seed == 7
        assert [epoch for epoch, _ in result.curves["coco/bbox_mAP"]] == [1]
    checkpoint = store.path / "mdconv/seed_7/train/epoch_1.pth"
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert any("conv_offset" in name for name in weights)
    assert "    seed: 7\n" in (store.path / "plain/seed_7/log.txt").read_text()

    arguments = ["report", str(store.path), "--metrics", "coco/bbox_mAP_50"]
    assert tool.main(arguments) == 0
    assert f"written: {store.path / 'report' / 'report.html'}" in capsys.readouterr().out
    with (store.path / "report" / "runs.csv").open() as file:
        runs = {run["row"]: float(run["metric/coco/bbox_mAP_50"]) for run in csv.DictReader(file)}
    expected = [result.metrics["coco/bbox_mAP_50"] for result in (plain, mdconv)]
    assert list(runs) == ["plain", "mdconv"] and list(runs.values()) == pytest.approx(expected)
    assert tool.main(["report", str(store.path), "--out", "elsewhere"]) == 0
    page = Path("elsewhere/report.md").read_text()
    assert "| coco/bbox_mAP |" in page and "coco/bbox_mAP_50" not in page  # those of the spec
    with pytest.raises(SystemExit):
        tool.main([*arguments, "coco/nothing"])
    assert "coco/nothing" in capsys.readouterr().err

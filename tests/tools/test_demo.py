"""The demo runs its steps in order, stops at the first that fails, and judges the result.

The steps themselves are tested where they belong; here they are played.
"""

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("rich")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "tools" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for path in ("tools/make_shapes.py", "tools/train.py", "tools/test.py", module.CONFIG):
        assert (ROOT / path).is_file()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["demo.py"])
    return module


@pytest.fixture
def played(demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Plays the tools: which ran, the AP50 that is measured, and the one that fails."""
    state = SimpleNamespace(steps=[], ap50=0.7, fails=None)

    def run(command: list[str], **options) -> subprocess.CompletedProcess:
        tool = Path(command[1]).name
        state.steps.append((tool, command[2:]))
        work_dir = tmp_path / "work_dirs/demo"
        if tool == "train.py":
            work_dir.mkdir(parents=True, exist_ok=True)
            (work_dir / "last_checkpoint").write_text("/elsewhere/epoch_12.pth")
        if tool == "test.py":
            # An earlier report must not be taken for the latest.
            for stamp, value in (("20260101_000000", 0.1), ("20260102_000000", state.ap50)):
                (work_dir / "test" / stamp).mkdir(parents=True, exist_ok=True)
                keys = [f"coco/{k}_mAP{s}" for k in ("bbox", "segm") for s in ("", "_50", "_75")]
                report = work_dir / "test" / stamp / f"{stamp}.json"
                report.write_text(json.dumps(dict.fromkeys(keys, value)))
        return subprocess.CompletedProcess(command, int(tool == state.fails))

    monkeypatch.setattr(demo.subprocess, "run", run)
    return state


def test_steps_and_result(demo: ModuleType, played: SimpleNamespace, capsys) -> None:
    demo.main()
    tools = ["make_shapes.py", "train.py", "test.py", "visualize_sampling.py"]
    assert [tool for tool, _ in played.steps] == tools
    assert "--resume" in played.steps[1][1]
    for _, arguments in played.steps[2:]:
        assert arguments[1] == "work_dirs/demo/epoch_12.pth"
    output = capsys.readouterr().out
    assert "0.700" in output and "work_dirs/demo/sampling.png" in output


def test_a_failing_step_ends_it(demo: ModuleType, played: SimpleNamespace) -> None:
    played.fails = "train.py"
    with pytest.raises(SystemExit, match="the step 'training' failed"):
        demo.main()
    assert len(played.steps) == 2


def test_a_poor_detector_is_an_error(demo: ModuleType, played: SimpleNamespace) -> None:
    played.ap50 = 0.3
    with pytest.raises(SystemExit, match=r"box AP50 is below 0\.5"):
        demo.main()


def test_restart_forgets_the_training(
    demo: ModuleType, played: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "work_dirs/demo/epoch_3.pth"
    old.parent.mkdir(parents=True)
    old.touch()
    demo.main()
    assert old.exists()
    monkeypatch.setattr("sys.argv", ["demo.py", "--restart"])
    demo.main()
    assert not old.exists()

"""Runs end as if nobody had disturbed them: killed, shared, failed, stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmengine")
pytest.importorskip("submitit")
import submitit

from mmdeform.ablation import Store, train_runs
from mmdeform.ablation import job as job_script
from mmdeform.ablation.job import RunFolder, forget_unvalidated, write_json

from .small import small_store

FAKE = (sys.executable, str(Path(__file__).with_name("fake_train.py")))


@pytest.fixture(autouse=True)
def pause(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FAKE_PAUSE", "0.02")
    monkeypatch.chdir(tmp_path)


def train(store: Store, command: Any = FAKE) -> list[Any]:
    *_, results = train_runs(store, command, poll=0.02)
    return results


def fork_runner(store: Store) -> int:
    """Starts a runner in a process, and a process group, of its own; returns its number."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            train(store)
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def lines_logged(store: Store) -> int:
    return sum(len(run.scalars()) for _, _, run in store.runs())


def starts(store: Store) -> list[int]:
    return [
        (run.path / "starts.txt").read_text().count("start")
        for _, _, run in store.runs()
        if (run.path / "starts.txt").exists()
    ]


def test_killed_three_times_the_table_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = small_store(tmp_path / "undisturbed", resources=dict(parallel=2))
    expected = train(undisturbed)
    assert {result.status for result in expected} == {"finished"}
    assert starts(undisturbed) == [1, 1, 1, 1]
    values = [result.metrics["coco/bbox_mAP"] for result in expected]
    assert len(set(values)) == 4

    monkeypatch.setenv("FAKE_PAUSE", "0.1")
    store = small_store(tmp_path / "killed", resources=dict(parallel=2))
    seen = set()
    for moment in sorted(random.Random(0).sample(range(2, 30), 3)):  # of 36 lines
        pid = fork_runner(store)
        wait_for(lambda moment=moment: lines_logged(store) >= moment)
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        wait_for(lambda: not any(run.is_locked() for _, _, run in store.runs()))
        seen |= {result.status for result in store.results()}
    assert "interrupted" in seen
    assert train(store) == expected
    assert sum(starts(store)) > 4


def test_two_runners_train_each_run_once(tmp_path: Path) -> None:
    store = small_store(tmp_path, resources=dict(parallel=2))
    runners = [fork_runner(store) for _ in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in runners] == [0, 0]
    assert {result.status for result in store.results()} == {"finished"}
    assert starts(store) == [1, 1, 1, 1]


def start_job(run: RunFolder) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, job_script.__file__, run.path, "1", ".", *FAKE],
                            env=dict(os.environ, CUDA_VISIBLE_DEVICES=""))  # fmt: skip


def test_training_whose_job_was_killed_is_not_started_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_PAUSE", "0.2")
    store = small_store(tmp_path, seeds=[0], axes=dict(depth={"one": {}}))
    ((_, _, run),) = store.runs()
    job = start_job(run)
    wait_for(lambda: bool(run.scalars()))
    job.kill()
    job.wait()
    assert run.status()["status"] == "running"
    assert start_job(run).wait() == 0  # which leaves it alone
    assert starts(store) == [1]
    wait_for(lambda: run.status()["status"] == "interrupted")
    assert start_job(run).wait() == 0
    assert run.status()["status"] == "finished"
    assert len(run.validations()) == 3
    assert (run.path / "starts.txt").read_text() == "start 1\nstart 4\n"


def test_failures_are_kept_until_they_are_retried(tmp_path: Path) -> None:
    store = small_store(tmp_path, axes=dict(row={"good": {}, "bad": {"model.fails": True}}))
    for _ in range(2):  # the second changes nothing
        good, _, bad, _ = train(store)
        assert (good.status, good.error) == ("finished", None)
        assert bad.status == "failed" and bad.metrics == {}
        assert "the loss is not finite\nexit code 1" in bad.error
        assert starts(store) == [1, 1, 1, 1]
    assert "threads 1, GPUs ''" in (store.path / "bad/seed_0/log.txt").read_text()
    Path("repaired").touch()
    assert store.retry() == ["bad/seed_0", "bad/seed_1"]
    assert {result.status for result in train(store)} == {"finished"}
    assert starts(store) == [1, 2, 1, 2]
    assert store.retry() == []


def test_a_training_without_the_last_validation_failed(tmp_path: Path) -> None:
    store = small_store(tmp_path, seeds=[0], metrics=["coco/bbox_mAP", "coco/segm_mAP"])
    result, *_ = train(store)
    assert result.status == "failed"
    assert "without a validation after epoch 3 with coco/bbox_mAP, coco/segm_mAP" in result.error


def test_what_is_killed_again_and_again_failed(tmp_path: Path) -> None:
    store = small_store(tmp_path, seeds=[0], axes=dict(depth={"one": {}}))
    command = ["sh", "-c", "echo start >> $(dirname $1)/starts.txt; kill -9 $$", "sh"]
    (result,) = train(store, command)
    assert result.status == "failed" and "interrupted 3 times" in result.error
    assert starts(store) == [3]


def test_closing_stops_the_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_PAUSE", "30")
    store = small_store(tmp_path, resources=dict(parallel=2))
    runs = train_runs(store, FAKE, poll=0.02)
    for _ in runs:
        if lines_logged(store) == 2:
            break
    runs.close()
    statuses = [result.status for result in store.results()]
    assert sorted(statuses) == ["interrupted", "interrupted", "planned", "planned"]


def test_gpus_are_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    resources = dict(parallel=2, gpus=1, cpu_threads=2)
    store = small_store(tmp_path, seeds=[0], resources=resources)
    train(store)
    logs = [run.log.read_text().strip() for _, _, run in store.runs()]
    assert sorted(logs) == ["threads 2, GPUs '3'", "threads 2, GPUs '5'"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ValueError, match="2 runs with a GPU each, but 1 GPUs"):
        next(train_runs(store, FAKE))


def test_training_needs_submitit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"submitit.*pip install 'mmdeform\[tools\]'"):
        train(small_store(tmp_path))


def test_slurm_gets_the_resources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class Executor:
        def __init__(self, folder: Path, cluster: str) -> None:
            given.update(folder=folder, cluster=cluster)

        def update_parameters(self, **parameters: Any) -> None:
            given.update(parameters)

        def submit(self, _: Any, program: str, arguments: list[str]) -> Any:
            process = subprocess.Popen(arguments, executable=program)

            class Job:
                def done(self) -> bool:
                    return process.poll() is not None

            return Job()

    monkeypatch.setattr(submitit, "AutoExecutor", Executor)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    resources = dict(gpus=1, cpu_threads=4, timeout_min=90, slurm=dict(slurm_partition="large"))
    store = small_store(tmp_path, seeds=[0], resources=resources)
    *_, results = train_runs(store, FAKE, slurm=True, poll=0.02)
    assert {result.status for result in results} == {"finished"}
    assert given == dict(
        folder=store.path.absolute() / "_jobs",
        cluster="slurm",
        name="small",
        timeout_min=90,
        cpus_per_task=4,
        gpus_per_node=1,
        slurm_partition="large",
    )


@pytest.mark.parametrize(
    ("pointer", "validated", "interval", "begin", "expected"),
    [
        ("epoch_2.pth", [1, 2], 1, 1, "epoch_2.pth"),
        ("epoch_2.pth", [1], 1, 1, "epoch_1.pth"),  # its validation was interrupted
        ("epoch_1.pth", [], 1, 1, None),  # there is no earlier one
        ("epoch_2.pth", [], 3, 1, "epoch_2.pth"),  # it has none
        ("epoch_2.pth", [], 1, 3, "epoch_2.pth"),
        ("epoch_4.pth", [3], 3, 1, "epoch_2.pth"),  # after the last one there always is one
        ("", [1, 2], 1, 1, "epoch_2.pth"),  # cut off while it was written
    ],
)
def test_resumes_before_a_validation_that_is_missing(
    tmp_path: Path,
    pointer: str,
    validated: list[int],
    interval: int,
    begin: int,
    expected: str | None,
) -> None:
    run = RunFolder(tmp_path)
    logs = run.work_dir / "1" / "vis_data"
    logs.mkdir(parents=True)
    facts = dict(max_epochs=4, val_interval=interval, val_begin=begin, metrics=["m"])
    write_json(run.path / "run.json", facts)
    for name in ("epoch_1.pth", "epoch_2.pth"):
        (run.work_dir / name).touch()
    (run.work_dir / "last_checkpoint").write_text(pointer and f"some/where/{pointer}")
    lines = [json.dumps(dict(m=0.5, step=epoch)) for epoch in validated]
    (logs / "scalars.json").write_text("\n".join([*lines, '{"m": 0.']))
    forget_unvalidated(run)
    if expected is None:
        assert not (run.work_dir / "last_checkpoint").exists()
    else:
        path = Path((run.work_dir / "last_checkpoint").read_text())
        assert path == run.work_dir / expected

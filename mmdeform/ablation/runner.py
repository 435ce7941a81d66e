"""Trains the runs of an ablation as jobs of submitit, on this machine or on Slurm."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import job as job_script
from .job import RunFolder
from .results import RowResult
from .store import Store, run_status

ATTEMPTS = 3  # of one runner to get a run to its end


def train_runs(
    store: Store, train_command: Sequence[str], slurm: bool = False, poll: float = 2.0
) -> Iterator[list[RowResult]]:
    """Trains what is neither finished nor failed, and yields what is known meanwhile.

    Closing the iterator stops the jobs on this machine; those on Slurm go on. Several of these may
    work on one store: every run is trained by one of them at a time.

    Args:
        store (Store): Of the ablation.
        train_command (Sequence[str]): What trains: called with ``CONFIG --work-dir DIR --resume``.
        slurm (bool): Submit to Slurm. A job that waits in its queue is unknown to other runners;
            the second of two jobs for a run ends at once.
        poll (float): Seconds between looks.

    Raises:
        ValueError: There is no Slurm here.
    """
    slots: list[_Job | None] = [None] * store.resources.parallel
    attempts: dict[Path, int] = {}
    try:
        while True:
            slots = [slot if slot and not slot.done() else None for slot in slots]
            open_runs = [run for _, _, run in store.runs() if _is_open(run)]
            mine = {slot.run.path for slot in slots if slot}
            for run in open_runs:
                if None not in slots:
                    break
                if run.path in mine or run.is_locked():
                    continue
                if attempts.get(run.path, 0) == ATTEMPTS:
                    _give_up(run)
                    continue
                attempts[run.path] = attempts.get(run.path, 0) + 1
                free = slots.index(None)
                slots[free] = _Job(store, run, train_command, slurm, free)
            yield store.results()
            if not open_runs and not any(slots):
                return
            time.sleep(poll)
    finally:
        if not slurm:
            for slot in slots:
                if slot:
                    slot.stop()


class _Job:
    """A run that was submitted."""

    def __init__(
        self, store: Store, run: RunFolder, command: Sequence[str], slurm: bool, slot: int
    ) -> None:
        self.run = run
        executor = _executor(store, slurm, slot)
        arguments = [sys.executable, str(Path(job_script.__file__).absolute()), str(run.path)]
        arguments += [str(store.resources.cpu_threads), os.getcwd(), *command]
        # The job's process becomes the script: signals reach it, and what it leaves in the folder of
        # the run is all that counts.
        self.job: Any = executor.submit(os.execv, sys.executable, arguments)

    def done(self) -> bool:
        return self.job.done()

    def stop(self) -> None:
        if self.done():
            return
        self.job.cancel()
        for _ in range(100):
            if self.job.done():
                return
            time.sleep(0.05)


def _executor(store: Store, slurm: bool, slot: int) -> Any:
    import submitit  # only those who train need it

    resources = store.resources
    kind = "slurm" if slurm else "local"
    try:
        executor = submitit.AutoExecutor(store.path.absolute() / "jobs", cluster=kind)
    except RuntimeError as error:
        raise ValueError(f"no Slurm on this machine: {error}") from error
    executor.update_parameters(
        name=store.name, timeout_min=resources.timeout_min, gpus_per_node=resources.gpus
    )
    if slurm:
        executor.update_parameters(cpus_per_task=resources.cpu_threads, **resources.slurm)
    elif resources.gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = [int(number) for number in visible.split(",")] if visible else list(range(slot + 1))
        if slot >= len(gpus):
            raise ValueError(f"{resources.parallel} runs at a time, but the GPUs are {gpus}")
        executor.update_parameters(visible_gpus=[gpus[slot]])
    return executor


def _is_open(run: RunFolder) -> bool:
    return run_status(run) not in ("finished", "failed")


def _give_up(run: RunFolder) -> None:
    with run.lock() as lock:
        if lock is not None and _is_open(run):
            run.set_status("failed", f"interrupted {ATTEMPTS} times; its output is in {run.log}")

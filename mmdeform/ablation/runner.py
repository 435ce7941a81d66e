"""Trains the runs of an ablation as jobs of submitit, on this machine or on Slurm."""

import contextlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import job as job_script
from .job import RunFolder
from .results import RowResult
from .store import Store, run_status

ATTEMPTS = 3  # of one runner to get from one checkpoint to the next
STOP_PATIENCE = 10.0  # seconds


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
        ValueError: There is no submitit or no Slurm here, or too few GPUs.
    """
    gpus = _gpus(store, slurm)
    slots: list[_Job | None] = [None] * len(gpus)
    attempts: Counter[tuple[Path, str]] = Counter()
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
                attempt = (run.path, _last_checkpoint(run))
                if attempts[attempt] == ATTEMPTS:
                    _give_up(run)
                    continue
                attempts[attempt] += 1
                free = slots.index(None)
                slots[free] = _Job(store, run, train_command, slurm, gpus[free])
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
        self,
        store: Store,
        run: RunFolder,
        command: Sequence[str],
        slurm: bool,
        gpu: int | None,
    ) -> None:
        self.run = run
        executor = _executor(store, slurm, gpu)
        arguments = [sys.executable, str(Path(job_script.__file__).absolute()), str(run.path)]
        arguments += [str(store.resources.cpu_threads), os.getcwd(), *command]
        # The process of the job becomes the script: signals reach it. What it leaves in the folder
        # of the run is all that counts.
        self.job: Any = executor.submit(os.execv, sys.executable, arguments)

    def done(self) -> bool:
        return self.job.done()

    def stop(self) -> None:
        """Stops a job of this machine."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(self.job.job_id), signal.SIGTERM)  # submitit hands it on
        end = time.monotonic() + STOP_PATIENCE
        while not self.done() and time.monotonic() < end:
            time.sleep(0.05)


def _executor(store: Store, slurm: bool, gpu: int | None) -> Any:
    try:
        import submitit  # only those who train need it
    except ImportError as error:
        raise ValueError(f"{error}: pip install 'mmdeform[tools]'") from error
    resources, folder = store.resources, store.path.absolute() / "_jobs"
    if not slurm:
        # AutoExecutor hides which GPUs a job gets.
        executor = submitit.LocalExecutor(folder)
        gpus = [] if gpu is None else [gpu]
        executor.update_parameters(
            timeout_min=resources.timeout_min, gpus_per_node=len(gpus), visible_gpus=gpus
        )
        return executor
    try:
        executor = submitit.AutoExecutor(folder, cluster="slurm")
        executor.update_parameters(
            name=store.name,
            timeout_min=resources.timeout_min,
            cpus_per_task=resources.cpu_threads,
            **(dict(gpus_per_node=1) if resources.gpus else {}),
            **resources.slurm,
        )
    except RuntimeError as error:
        raise ValueError(f"no Slurm on this machine: {error}") from error
    except NameError as error:
        raise ValueError(f"resources: slurm: {error}") from error
    return executor


def _gpus(store: Store, slurm: bool) -> list[int] | list[None]:
    """A GPU for each run at a time; None on the CPU, and where Slurm gives one.

    Raises:
        ValueError: There are fewer.
    """
    count = store.resources.parallel
    if slurm or not store.resources.gpus:
        return [None] * count
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        gpus = [int(i) for i in visible.split(",")] if visible else []
    except ValueError:
        raise ValueError(f"CUDA_VISIBLE_DEVICES: expected numbers, got {visible!r}") from None
    gpus = gpus or list(range(torch.cuda.device_count()))
    if len(gpus) < count:
        raise ValueError(f"resources: parallel: {count} runs with a GPU each, but {len(gpus)} GPUs")
    return gpus[:count]


def _is_open(run: RunFolder) -> bool:
    return run_status(run) not in ("finished", "failed")


def _last_checkpoint(run: RunFolder) -> str:
    pointer = run.work_dir / "last_checkpoint"
    return pointer.read_text() if pointer.is_file() else ""


def _give_up(run: RunFolder) -> None:
    with run.lock() as lock:
        if lock is not None and _is_open(run):
            run.set_status(
                "failed",
                f"interrupted {ATTEMPTS} times before the next checkpoint; see {run.log}",
            )

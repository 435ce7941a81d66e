"""One run, a row with a seed: its folder, and the process that trains it.

    python job.py FOLDER THREADS CWD COMMAND...

Trains with ``COMMAND CONFIG --work-dir DIR --resume``. Whoever trains holds a lock on the folder,
and so does the training itself: the kernel releases it when both are gone, however they ended. Only
the standard library is imported, so that a job starts at once.
"""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ERROR_LINES = 20
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)  # the last one by submitit
NO_METRICS = ("step", "time", "data_time")
LOCK_PATIENCE = 1.0  # seconds: longer than anyone looks at a lock


class RunFolder:
    """The folder of a run: ``config.py``, ``run.json``, ``status.json``, ``log.txt``, ``train/``.

    Args:
        path (str or Path): The folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.config = self.path / "config.py"
        self.log = self.path / "log.txt"
        self.work_dir = self.path / "train"

    def status(self) -> dict[str, Any]:
        """``{"status": ..., "error": ...}``; ``"interrupted"`` if nobody goes on with it."""
        stored = read_json(self.path / "status.json", dict(status="planned"))
        if self.is_locked():
            return dict(status="running", error=None)
        if stored["status"] == "running":
            stored = read_json(self.path / "status.json", stored)  # it may have ended just now
            if stored["status"] == "running":
                stored["status"] = "interrupted"
        return stored

    def set_status(self, status: str, error: str | None = None) -> None:
        write_json(self.path / "status.json", dict(status=status, error=error))

    def is_locked(self) -> bool:
        """Whether a process trains it."""
        if not self.path.is_dir():  # somebody removed it, to train it anew
            return False
        with open(self.path / "lock", "a") as file:
            return not _try_lock(file, fcntl.LOCK_SH)

    @contextmanager
    def lock(self) -> Iterator[int | None]:
        """The descriptor of the lock, or None if another process has it."""
        with open(self.path / "lock", "a") as file:
            end = time.monotonic() + LOCK_PATIENCE
            while not (locked := _try_lock(file, fcntl.LOCK_EX)) and time.monotonic() < end:
                time.sleep(0.02)
            yield file.fileno() if locked else None

    def scalars(self) -> list[dict[str, Any]]:
        """What the training logged, in its order, over all interruptions."""
        records = []
        for path in sorted(self.work_dir.glob("*/vis_data/scalars.json")):
            for line in path.read_text().splitlines():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError:
                    continue  # cut off in the middle
        return records

    def validations(self) -> dict[int, dict[str, float]]:
        """Metrics by the epoch after which they were measured, from 1."""
        return {
            record["step"]: {k: v for k, v in record.items() if k not in NO_METRICS}
            for record in self.scalars()
            if "lr" not in record  # which training logs
        }

    def final_metrics(self) -> dict[str, float] | None:
        """Of the validation after the last epoch; None unless all are there that should be."""
        run = read_json(self.path / "run.json")
        metrics = self.validations().get(run["max_epochs"], {})
        return metrics if set(run["metrics"]) <= set(metrics) else None


def forget_unvalidated(folder: RunFolder) -> None:
    """Makes the training resume before an epoch whose validation was interrupted.

    The checkpoint of an epoch is written before its validation, which resumed training would skip.
    """
    pointer = folder.work_dir / "last_checkpoint"
    if not pointer.is_file():
        return
    run = read_json(folder.path / "run.json")
    saved = {int(path.stem[6:]): path for path in folder.work_dir.glob("epoch_*.pth")}
    match = re.search(r"epoch_(\d+)\.pth$", pointer.read_text().strip())
    last = int(match[1]) if match else max(saved, default=0)  # cut off while it was written
    validated = folder.validations()
    due = last % run["val_interval"] == 0 or last == run["max_epochs"]
    if due and last >= run["val_begin"] and last not in validated:
        last = max((epoch for epoch in saved if epoch < last), default=0)
    if last in saved:
        pointer.write_text(str(saved[last]))
    else:
        pointer.unlink()


def train(folder: RunFolder, command: list[str], threads: int, cwd: str) -> int:
    """Trains a run, from where it was left, unless it is done, failed, or somebody else's.

    Returns:
        int: 0, or 1 if it failed.
    """
    with folder.lock() as lock:
        if lock is None:
            return 0
        stored = read_json(folder.path / "status.json", dict(status="planned"))
        if stored["status"] in ("finished", "failed"):
            return 0
        folder.set_status("running")
        forget_unvalidated(folder)
        start = folder.log.stat().st_size if folder.log.exists() else 0
        with open(folder.log, "a") as log:
            code = _call(
                [*command, str(folder.config), "--work-dir", str(folder.work_dir), "--resume"],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads)),
                pass_fds=[lock],
            )
        if code < 0 and -code in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            folder.set_status("interrupted")  # by somebody, or for want of memory
            return 1
        with open(folder.log, errors="replace") as log:
            log.seek(start)
            lines = log.read().splitlines()[-ERROR_LINES:]
        if code:
            folder.set_status("failed", "\n".join([*lines, f"exit code {code}"]))
        elif folder.final_metrics() is None:
            run = read_json(folder.path / "run.json")
            wanted = f"epoch {run['max_epochs']} with {', '.join(run['metrics'])}"
            folder.set_status("failed", f"the training ended without a validation after {wanted}")
        else:
            folder.set_status("finished")
            return 0
        return 1


def _call(command: list[str], **options: Any) -> int:
    """The exit code of a command, which is killed where this process is asked to end."""

    class Stopped(BaseException):
        pass

    def stop(*_: Any) -> None:
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)
        raise Stopped

    process = None
    try:
        for number in STOPPING:
            signal.signal(number, stop)
        process = subprocess.Popen(command, **options)
        return process.wait()
    except Stopped:
        if process is not None:
            process.kill()
            process.wait()
        return -signal.SIGTERM
    finally:
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)


def write_text(path: Path, text: str) -> None:
    """Writes a file at once: after a crash it is the old one or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """As :func:`write_text`."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path, default: Any = None) -> Any:
    """What a file holds, or a default, if there is one, where there is no file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        if default is None:
            raise
        return default


def _try_lock(file: Any, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


if __name__ == "__main__":
    _folder, _threads, _cwd, *_command = sys.argv[1:]
    sys.exit(train(RunFolder(_folder), _command, int(_threads), _cwd))

"""Where a benchmark ran: enough to run it again."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from mmdeform.ops import _library
from mmdeform.version import __version__

__all__ = ["describe"]

_ROOT = Path(__file__).resolve().parents[3]
_PACKAGES = ("mmcv", "mmengine", "torchvision", "numpy")


def describe(device: torch.device) -> dict[str, Any]:
    """Versions, hardware, threads, kernels and commit, ready for JSON."""
    libraries = {
        name: entry.capability if entry.loaded else None
        for name, entry in _library.status().items()
    }
    return {
        "mmdeform": __version__,
        "commit": _commit(),
        "command": [Path(sys.executable).name, *sys.argv],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "libraries": libraries,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cuda": _cuda(device) if device.type == "cuda" else None,
    }


def _cuda(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "toolkit": torch.version.cuda,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree, with ``+changes`` if files differ from it; None elsewhere."""
    if not (_ROOT / ".git").exists():
        return None
    commit = _run("git", "-C", str(_ROOT), "rev-parse", "HEAD")
    changes = _run("git", "-C", str(_ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changes else commit


def _run(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip() if done.returncode == 0 else None

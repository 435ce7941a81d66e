"""``python -m mmdeform.doctor``: what is installed, which kernels run, and how to repair the rest.

Exits with 1 if it found a problem, each of which comes with the command that fixes it.
"""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from mmdeform import ops
from mmdeform.ops import _library
from mmdeform.version import __version__

__all__ = ["Problem", "Report", "diagnose", "main"]

ROOT = Path(__file__).resolve().parent.parent
PIP = f"{shlex.quote(sys.executable)} -m pip"
# mmcv's build and mmengine's `mmdet::` configs import pkg_resources, which setuptools has dropped.
SETUPTOOLS = f"{PIP} install 'setuptools<81' wheel"
MMENGINE = f"{PIP} install mmengine==0.10.7"
# Not from pip's cache: its wheel may have been built for another torch.
MMCV = f"{SETUPTOOLS} && {PIP} install --no-build-isolation --no-cache-dir mmcv==2.1.0"
# Maintained forks under the same import names, and the versions that the tests run on.
FORKS = {
    "mmengine": "onedl-mmengine==0.10.12",
    "mmcv": "onedl-mmcv==2.3.6",
    "mmdet": "onedl-mmdetection==3.5.1",
}
ENVIRONMENT = (
    "MMDEFORM_REQUIRE_EXT",
    "MMDEFORM_CPU_CAPABILITY",
    "MMDEFORM_CPU_LIBRARY",
    "CUDA_VISIBLE_DEVICES",
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that does not work.

    Attributes:
        text: What is wrong.
        fix: The shell command that repairs it.
    """

    text: str
    fix: str


@dataclasses.dataclass
class Report:
    """What the doctor found.

    Attributes:
        rows: Pairs of a name and its value.
        problems: What does not work.
    """

    rows: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    problems: list[Problem] = dataclasses.field(default_factory=list)

    def row(self, name: str, value: object) -> None:
        self.rows.append((name, str(value)))

    def problem(self, text: str, fix: str) -> None:
        self.problems.append(Problem(text, fix))


def diagnose() -> Report:
    """Looks at versions, packages, libraries and GPUs, and runs each operator once per device."""
    report = Report()
    for check in (_check_torch, _check_openmmlab, _check_setuptools, _check_libraries):
        check(report)
    for device in ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))):
        _check_operators(report, torch.device(device))
    _check_environment(report)
    return report


def build_command(variables: str = "") -> str:
    """The command that builds the libraries, with environment variables for the build before it."""
    prefix = f"{variables} " if variables else ""
    if (ROOT / "setup.py").exists():
        return f"cd {shlex.quote(str(ROOT))} && {prefix}{PIP} install --no-build-isolation -e ."
    return (
        f"{prefix}{PIP} install --no-build-isolation --no-deps --force-reinstall "
        "<folder with the source of mmdeform>"
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _fork_version(name: str) -> str | None:
    """The version of the fork that is installed as ``mmengine``, ``mmcv`` or ``mmdet``."""
    return _version(FORKS[name].partition("==")[0])


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 13) of ``2.13.0+cpu``."""
    numbers = []
    for part in version.split("+")[0].split(".")[:2]:
        digits = "".join(c for c in part if c.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)


def _check_torch(report: Report) -> None:
    report.row("mmdeform", f"{__version__} ({ROOT / 'mmdeform'})")
    report.row("python", f"{platform.python_version()} on {platform.platform()}")
    report.row("torch", torch.__version__)
    report.row("CUDA of torch", torch.version.cuda or "none (CPU build)")
    report.row("numpy", _version("numpy") or "not installed")
    if _release(torch.__version__) < (2, 10):
        report.problem(
            f"torch {torch.__version__} is too old: the libraries use the stable ABI of torch 2.10",
            f"{PIP} install 'torch>=2.10'",
        )


def _check_openmmlab(report: Report) -> None:
    for name, requirement in FORKS.items():
        version, fork_version = _version(name), _fork_version(name)
        fork = requirement.partition("==")[0]
        report.row(name, f"{fork_version} ({fork})" if fork_version else version or "not installed")
        if version and fork_version:
            report.problem(
                f"{name} {version} and {fork} {fork_version} are both installed, in one folder",
                f"{PIP} uninstall -y {name} {fork}",
            )
    if importlib.util.find_spec("mmengine") is None:
        report.problem("mmengine is not installed: no layers, no configs, no training", MMENGINE)
        return
    if importlib.util.find_spec("mmcv") is None:
        report.problem("mmcv is not installed: the operators work, there are no layers", MMCV)
        return
    error = _import_error("mmcv.ops")
    if error is not None:
        # mmcv-lite lacks the library _ext; one built for another torch has it and cannot load it.
        cause = "without its operators" if "No module named 'mmcv._ext'" in error else "unusable"
        report.problem(
            f"mmcv is installed {cause}, so there are no layers: {error}",
            _rebuild("mmcv")
            if _fork_version("mmcv")
            else f"{PIP} uninstall -y mmcv mmcv-lite; {MMCV}",
        )
        return
    error = _import_error("mmdet") if importlib.util.find_spec("mmdet") is not None else None
    if error is not None:
        fix = f"{PIP} install --force-reinstall mmdet==3.3.0"
        if _fork_version("mmdet"):
            fix = _rebuild("mmdet")
        elif error.startswith("AssertionError"):  # mmdet asserts the versions that it accepts
            fix = f"{MMENGINE} && {MMCV}"
        report.problem(f"mmdet cannot be imported: {error}", fix)


def _rebuild(name: str) -> str:
    """The command that installs a fork again, for the torch that is installed."""
    options = "--no-build-isolation --no-cache-dir --no-deps --force-reinstall"
    return f"{PIP} install {options} {FORKS[name]}"


def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # mmdet checks versions by assertion
        return f"{type(error).__name__}: {error}"
    return None


def _check_setuptools(report: Report) -> None:
    version = _version("setuptools")
    report.row("setuptools", version or "not installed")
    if _fork_version("mmengine"):  # the forks do without pkg_resources
        return
    if version is None or _release(version) >= (81,):
        report.problem(
            f"setuptools {version or 'is not installed'}: building mmcv and reading `mmdet::` "
            "configs need its pkg_resources, which 81 announces to drop and 82 lacks",
            SETUPTOOLS,
        )


def _check_libraries(report: Report) -> None:
    status = _library.status()
    for device_type, what in (("cpu", "instruction set"), ("cuda", "architectures")):
        library = status[device_type]
        if library.loaded:
            report.row(f"{device_type} library", f"{library.path}, {what}: {library.capability}")
        elif library.problem is None:
            exists = "present" if library.path.exists() else "absent"
            report.row(f"{device_type} library", f"{exists}, not needed by this torch")
        else:
            report.row(f"{device_type} library", "NOT LOADED, the slow reference runs instead")
            variables = "MMDEFORM_CUDA=1" if device_type == "cuda" else ""
            report.problem(library.problem + _nvcc_hint(device_type), build_command(variables))
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        report.row(f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {major}.{minor}")
        archs = status["cuda"].capability
        if status["cuda"].loaded and not _runs_on(archs or "", (major, minor)):
            report.problem(
                f"cuda:{index} has compute capability {major}.{minor}; the CUDA library was built "
                f"for {archs}",
                build_command(f"MMDEFORM_CUDA=1 TORCH_CUDA_ARCH_LIST='{major}.{minor}'"),
            )


def _nvcc_hint(device_type: str) -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    if device_type == "cpu" or found:
        return ""
    return " (no nvcc on PATH or under CUDA_HOME: install the CUDA toolkit first)"


def _runs_on(archs: str, device: tuple[int, int]) -> bool:
    """Whether code built for ``archs``, e.g. ``8.0;9.0+PTX``, runs on a compute capability.

    Machine code runs on later minor versions of its major version; PTX on everything later.
    """
    for arch in archs.replace(" ", ";").split(";"):
        number, _, ptx = arch.partition("+")
        try:
            major, minor = (int(part) for part in number.split("."))
        except ValueError:  # empty, or architecture-specific such as 9.0a
            if number == f"{device[0]}.{device[1]}a":
                return True
            continue
        if (major == device[0] and minor <= device[1]) or (ptx and (major, minor) <= device):
            return True
    return False


def _has_kernel(name: str, device: torch.device) -> bool:
    return _library.has_kernel(name, device.type)


def _operator_cases() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Arguments of each operator on the CPU, and what its reference needs beside them."""
    random = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=random)

    conv = dict(stride=[1, 1], padding=[1, 1], dilation=[1, 1])
    depthwise = dict(conv, kernel_size=[3, 3], groups=2, offset_scale=1.5, remove_center=False)
    rois = torch.tensor([[0.0, 1.5, 2.0, 11.0, 9.5], [1.0, 0.0, 0.0, 15.0, 13.0]])
    pooling = dict(rois=rois, output_size=[3, 2], spatial_scale=0.5)
    return {
        "deform_conv2d": (
            dict(
                input=rand(2, 16, 7, 9), offset=rand(2, 18, 7, 9) * 4 - 2, mask=rand(2, 9, 7, 9),
                weight=rand(8, 16, 3, 3), bias=None, **conv,
            ),
            dict(groups=1, deform_groups=1),
        ),
        "ms_deform_attn": (
            dict(
                value=rand(2, 26, 2, 8), spatial_shapes=torch.tensor([[4, 5], [2, 3]]),
                level_start_index=torch.tensor([0, 20]),
                sampling_locations=rand(2, 5, 2, 2, 3, 2), attention_weights=rand(2, 5, 2, 2, 3),
            ),
            {},
        ),
        "deform_roi_pool": (
            dict(
                input=rand(2, 16, 7, 9), offset=rand(2, 2, 3, 2), mask=rand(2, 3, 2),
                sampling_ratio=0, gamma=0.3, **pooling,
            ),
            {},
        ),
        "deform_ps_roi_pool": (
            dict(
                input=rand(2, 4 * 4, 7, 9), offset=rand(2, 4, 3, 3), output_dim=4, group_size=2,
                part_size=3, sample_per_part=2, trans_std=0.3, **pooling,
            ),
            {},
        ),
        "dcnv3": (
            dict(
                input=rand(2, 7, 9, 16), offset=rand(2, 7, 9, 36) * 4 - 2, mask=rand(2, 7, 9, 18),
                **depthwise,
            ),
            {},
        ),
        "dcnv4": (
            dict(input=rand(2, 7, 9, 16), offset_mask=rand(2, 7, 9, 56) * 4 - 2, **depthwise),
            {},
        ),
        "dat_attn": (
            dict(
                query=rand(2, 4, 8, 5, 7), key=rand(2, 4, 8, 11), value=rand(2, 4, 8, 11),
                positions=rand(2, 2, 11, 2) * 3 - 1.5, table=rand(4, 9, 13), scale=0.5,
                align_corners=True,
            ),
            {},
        ),
    }  # fmt: skip


def _check_operators(report: Report, device: torch.device) -> None:
    """Runs each operator on random numbers and compares it with its reference on the CPU."""
    for name, (arguments, more) in _operator_cases().items():
        expected = getattr(ops, f"{name}_reference")(**arguments, **more)
        if isinstance(expected, tuple):  # what the backward pass needs beside the output
            expected = expected[0]
        moved = {
            key: value.to(device) if isinstance(value, torch.Tensor) else value
            for key, value in arguments.items()
        }
        try:
            error = (getattr(ops, name)(**moved).cpu() - expected).abs().max().item()
            outcome = "right" if error < 1e-4 else f"off by {error:.3g}"
        except RuntimeError as exception:
            outcome = f"fails: {exception}"
        kernel = _has_kernel(name, device)
        report.row(f"{name} on {device}", f"{outcome} ({'kernel' if kernel else 'reference'})")
        fix = build_command("MMDEFORM_CUDA=1" if device.type == "cuda" else "")
        if outcome != "right":
            report.problem(f"{name} on {device} {outcome}", fix)
        elif not kernel and _library.status()[device.type].loaded:
            report.problem(f"the {device.type} library is older than {name}: it has no kernel", fix)


def _check_environment(report: Report) -> None:
    for name in ENVIRONMENT:
        if name in os.environ:
            report.row(name, os.environ[name])
    value = os.environ.get("MMDEFORM_REQUIRE_EXT", "0")
    if value not in ("0", "1"):
        report.problem(
            f"MMDEFORM_REQUIRE_EXT={value} has no effect: only 1 forbids the references",
            "export MMDEFORM_REQUIRE_EXT=1",
        )


def _print_rows(rows: list[tuple[str, str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            print(f"{name:<{width}}  {value}")
        return
    table = Table(show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    # Wide enough that a path stays in one piece when the output goes to a file.
    Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False).print(table)


def main() -> int:
    """Prints the report; returns the exit status."""
    report = diagnose()
    _print_rows(report.rows)
    for problem in report.problems:  # plain lines, so that a command can be copied
        print(f"\nproblem: {problem.text}\n    fix: {problem.fix}")
    count = len(report.problems)
    print(f"\nProblems found: {count}")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())

"""The doctor names each problem, and the command that fixes it."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmdeform import doctor, ops
from mmdeform.ops import _library
from mmdeform.ops._library import LibraryStatus

CPU = LibraryStatus(Path("_C_cpu.so"), loaded=True, capability="avx2")
CUDA = LibraryStatus(Path("_C_cuda.so"), loaded=True, capability="8.0;9.0+PTX")


@pytest.fixture
def healthy(monkeypatch):
    """A machine on which everything is as it should be, whatever this one is like."""
    versions = dict(numpy="2.4.6", mmengine="0.10.7", mmcv="2.1.0", mmdet="3.3.0")
    versions["setuptools"] = "80.10.2"
    status = {"cpu": CPU, "cuda": LibraryStatus(Path("_C_cuda.so"))}
    monkeypatch.setattr(doctor, "_version", versions.get)
    monkeypatch.setattr(_library, "status", lambda: status)
    monkeypatch.setattr(doctor, "_import_error", lambda module: None)
    monkeypatch.setattr(doctor, "_has_kernel", lambda name, device: True)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda module: module)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in doctor.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    return dict(versions=versions, status=status)


def the_problem() -> doctor.Problem:
    problems = doctor.diagnose().problems
    assert len(problems) == 1, problems
    return problems[0]


def test_healthy(healthy, capsys):
    assert doctor.main() == 0
    output = capsys.readouterr().out
    for text in ("2.13.0+cpu", "mmcv", "3.3.0", "80.10.2", "avx2", "right", "Problems found: 0"):
        assert text in output


def test_missing_cpu_library(healthy, capsys):
    healthy["status"]["cpu"] = LibraryStatus(Path("_C_cpu.so"), problem="_C_cpu.so does not exist")
    problem = the_problem()
    assert problem.text == "_C_cpu.so does not exist"
    assert problem.fix.startswith(f"cd {doctor.ROOT} && {sys.executable} -m pip install")
    assert doctor.main() == 1
    output = capsys.readouterr().out
    assert "NOT LOADED" in output
    assert f"fix: {problem.fix}\n" in output


def test_build_command_of_an_installation_without_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    command = doctor.build_command("MMDEFORM_CUDA=1")
    assert command.startswith("MMDEFORM_CUDA=1 ")
    assert command.endswith("<folder with the source of mmdeform>")


def test_cuda_torch_without_cuda_library(healthy, monkeypatch):
    library = LibraryStatus(Path("_C_cuda.so"), problem="_C_cuda.so does not exist")
    healthy["status"]["cuda"] = library
    monkeypatch.setattr(doctor.shutil, "which", lambda *_, **__: None)
    problem = the_problem()
    assert "no nvcc" in problem.text
    assert "&& MMDEFORM_CUDA=1 " in problem.fix
    monkeypatch.setattr(doctor.shutil, "which", lambda *_, **__: "nvcc")
    assert the_problem().text == "_C_cuda.so does not exist"


@pytest.mark.parametrize(
    "capability, supported",
    [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((12, 0), True)],
)
def test_gpu_architecture(healthy, monkeypatch, capability, supported):
    healthy["status"]["cuda"] = CUDA
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA test")
    monkeypatch.setattr(doctor, "_check_operators", lambda report, device: None)
    if supported:
        assert doctor.diagnose().problems == []
    else:
        problem = the_problem()
        assert "compute capability 7.5" in problem.text
        assert "built for 8.0;9.0+PTX" in problem.text
        assert "MMDEFORM_CUDA=1 TORCH_CUDA_ARCH_LIST='7.5' " in problem.fix


@pytest.mark.parametrize(
    "archs, device, runs",
    [
        ("8.6", (8, 0), False),
        ("8.6 9.0", (8, 9), True),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),
        ("", (8, 0), False),
    ],
)
def test_runs_on(archs, device, runs):
    assert doctor._runs_on(archs, device) is runs


OPERATORS = [name.removesuffix("_reference") for name in ops.__all__ if "_reference" in name]


def test_every_operator_is_checked():
    cases = doctor._operator_cases()
    assert len(OPERATORS) >= 6 and set(cases) == set(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_wrong_operator(healthy, monkeypatch, name):
    right = getattr(doctor.ops, name)
    monkeypatch.setattr(doctor.ops, name, lambda *a, **k: right(*a, **k) + 0.5)
    problem = the_problem()
    assert problem.text == f"{name} on cpu off by 0.5"
    assert "pip install" in problem.fix


def test_library_without_a_kernel(healthy, monkeypatch):
    monkeypatch.setattr(doctor, "_has_kernel", lambda name, device: name != "deform_conv2d")
    assert the_problem().text == "the cpu library is older than deform_conv2d: it has no kernel"
    assert ("deform_conv2d on cpu", "right (reference)") in doctor.diagnose().rows
    assert ("ms_deform_attn on cpu", "right (kernel)") in doctor.diagnose().rows


def test_kernels_are_found():
    loaded = _library.status()["cpu"].loaded
    assert doctor._has_kernel("deform_conv2d", torch.device("cpu")) is loaded
    assert not doctor._has_kernel("deform_conv2d", torch.device("xpu"))


def test_failing_operator(healthy, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(doctor.ops, "ms_deform_attn", fail)
    assert the_problem().text == "ms_deform_attn on cpu fails: no kernel image"


def test_operator_that_gives_nan(healthy, monkeypatch):
    right = doctor.ops.deform_conv2d
    monkeypatch.setattr(doctor.ops, "deform_conv2d", lambda *a, **k: right(*a, **k) * float("nan"))
    assert the_problem().text == "deform_conv2d on cpu off by nan"


def test_old_torch(healthy, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    problem = the_problem()
    assert "2.9.1" in problem.text
    assert problem.fix.endswith("pip install 'torch>=2.10'")


@pytest.mark.parametrize("version", [None, "81.0.0", "82.1"])
def test_setuptools(healthy, version):
    healthy["versions"]["setuptools"] = version
    problem = the_problem()
    assert "pkg_resources" in problem.text
    assert problem.fix.endswith("pip install 'setuptools<81' wheel")


@pytest.mark.parametrize("package", ["mmengine", "mmcv"])
def test_missing_package(healthy, monkeypatch, package):
    healthy["versions"][package] = None
    find_spec = doctor.importlib.util.find_spec
    monkeypatch.setattr(
        doctor.importlib.util,
        "find_spec",
        lambda name: None if name == package else find_spec(name),
    )
    problem = the_problem()
    assert problem.text.startswith(f"{package} is not installed")
    assert f" {package}==" in problem.fix


@pytest.mark.parametrize(
    "module, error, text, fix",
    [
        ("mmcv.ops", "ModuleNotFoundError: No module named 'mmcv._ext'",
         "without its operators", "uninstall -y mmcv mmcv-lite; "),
        ("mmcv.ops", "ImportError: undefined symbol: _ZN3c10",
         "unusable, so there are no layers: ImportError: undefined", "mmcv==2.1.0"),
        ("mmdet", "AssertionError: MMCV==2.2.0 is used but incompatible.",
         "MMCV==2.2.0 is used but incompatible", "mmcv==2.1.0"),
        ("mmdet", "ModuleNotFoundError: No module named 'shapely'",
         "No module named 'shapely'", "pip install --force-reinstall mmdet==3.3.0"),
    ],
)  # fmt: skip
def test_package_that_cannot_be_imported(healthy, monkeypatch, module, error, text, fix):
    monkeypatch.setattr(doctor, "_import_error", {module: error}.get)
    problem = the_problem()
    assert text in problem.text
    assert fix in problem.fix


@pytest.fixture
def forks(healthy):
    """The same machine with the maintained forks, which need no old setuptools."""
    for name in ("mmengine", "mmcv", "mmdet"):
        del healthy["versions"][name]
    versions = {"onedl-mmengine": "0.10.12", "onedl-mmcv": "2.3.6", "onedl-mmdetection": "3.5.1"}
    healthy["versions"].update(versions, setuptools="84.2.1")
    return healthy["versions"]


def test_forks_are_as_good(forks):
    report = doctor.diagnose()
    assert report.problems == []
    assert ("mmdet", "3.5.1 (onedl-mmdetection)") in report.rows
    assert ("mmcv", "2.3.6 (onedl-mmcv)") in report.rows


@pytest.mark.parametrize(
    "module, fork", [("mmcv.ops", "onedl-mmcv==2.3.6"), ("mmdet", "onedl-mmdetection==3.5.1")]
)
def test_broken_fork_is_repaired_by_the_fork(forks, monkeypatch, module, fork):
    monkeypatch.setattr(doctor, "_import_error", {module: "ImportError: undefined symbol"}.get)
    problem = the_problem()
    assert "undefined symbol" in problem.text
    assert problem.fix.endswith(f"--force-reinstall {fork}")


def test_fork_beside_the_original(forks):
    forks["mmcv"] = "2.1.0"
    problem = the_problem()
    assert problem.text == "mmcv 2.1.0 and onedl-mmcv 2.3.6 are both installed, in one folder"
    assert problem.fix.endswith("pip uninstall -y mmcv onedl-mmcv")


def test_import_error_is_told_and_not_raised():
    assert doctor._import_error("mmdeform.ops") is None
    expected = "ModuleNotFoundError: No module named 'mmdeform_no_such'"
    assert doctor._import_error("mmdeform_no_such") == expected


def test_environment(healthy, monkeypatch):
    monkeypatch.setenv("MMDEFORM_CPU_CAPABILITY", "avx2")
    assert ("MMDEFORM_CPU_CAPABILITY", "avx2") in doctor.diagnose().rows
    monkeypatch.setenv("MMDEFORM_REQUIRE_EXT", "true")
    assert the_problem().fix == "export MMDEFORM_REQUIRE_EXT=1"


def test_without_rich(healthy, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert doctor.main() == 0
    assert "\nmmdet" in capsys.readouterr().out


def test_without_openmmlab(monkeypatch, capsys):
    for name in ("mmengine", "mmcv", "mmdet"):
        monkeypatch.setitem(sys.modules, name, None)  # as if not installed
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(doctor.__file__, run_name="__main__")
    assert exit_info.value.code == 1
    assert "mmengine is not installed" in capsys.readouterr().out


def run_doctor(**environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mmdeform.doctor"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_this_installation():
    result = run_doctor()
    assert result.returncode == 0, result.stdout
    assert "instruction set: " in result.stdout


def test_broken_installation():
    result = run_doctor(MMDEFORM_CPU_LIBRARY="/nowhere/_C_cpu.so")
    assert result.returncode == 1
    assert "problem: /nowhere/_C_cpu.so does not exist" in result.stdout
    assert f"fix: {doctor.build_command()}\n" in result.stdout

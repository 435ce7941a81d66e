"""The compiled libraries: what they link to, how they load, and the package without them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmdeform.ops import _library

ROOT = Path(__file__).resolve().parent.parent
CAPABILITIES = ["default", "avx2", "avx512"]
# Forward and backward of both operators, after `import mmdeform`; prints mmdeform's warnings.
COMPUTE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import mmdeform
    import torch
    for _ in range(2):
        x = torch.randn(1, 2, 4, 5, requires_grad=True)
        offset, weight = torch.zeros(1, 2, 4, 5), torch.eye(2).view(2, 2, 1, 1)
        output = mmdeform.ops.deform_conv2d(x, offset, weight)
        output.sum().backward()
        assert torch.equal(output, x) and torch.equal(x.grad, torch.ones_like(x))
        value = torch.randn(1, 1, 1, 3, requires_grad=True)
        location, weight = torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1)
        output = mmdeform.ops.ms_deform_attn(value, torch.tensor([[1, 1]]), None, location, weight)
        output.sum().backward()
        assert torch.equal(output, value[0]) and torch.equal(value.grad, torch.ones_like(value))
print(mmdeform.ops._library.status()["cpu"].capability)
for warning in caught:
    if "mmdeform" in str(warning.message):
        print("WARNING", warning.message)
"""


def run_python(
    code: str, folder: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MMDEFORM_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**clean, "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def source_package(tmp_path: Path) -> Path:
    """A folder with the Python files of the package and no compiled library."""
    shutil.copytree(
        ROOT / "mmdeform", tmp_path / "mmdeform", ignore=shutil.ignore_patterns("*.so", "*.pyc")
    )
    return tmp_path


def built(name: str) -> Path:
    path = ROOT / "mmdeform" / name
    if not path.exists():
        pytest.skip(f"{path} is not built")
    return path


def symbols(path: Path, *options: str) -> list[str]:
    if shutil.which("nm") is None:
        pytest.skip("needs nm (binutils)")
    listing = subprocess.run(
        ["nm", "-D", *options, str(path)], check=True, capture_output=True, text=True
    )
    return [line.split(maxsplit=1)[-1] for line in listing.stdout.splitlines()]


@pytest.mark.parametrize("name", ["_C_cpu.so", "_C_cuda.so"])
class TestSymbols:
    def test_only_stable_symbols_of_torch_are_needed(self, name: str) -> None:
        needed = symbols(built(name), "--undefined-only", "--demangle")
        needed = [re.sub(r"^[UwvW] ", "", symbol.strip()) for symbol in needed]
        assert any(symbol.startswith("aoti_torch_") for symbol in needed)
        unstable = [s for s in needed if re.search(r"\b(at|c10|torch|caffe2)::", s)]
        assert not unstable
        assert not [symbol for symbol in needed if re.match(r"_?Py", symbol)]

    def test_the_check_of_symbols_can_fail(self, name: str) -> None:
        """libtorch_python needs all that our libraries must not."""
        import torch

        built(name)
        library = Path(torch.__file__).parent / "lib" / "libtorch_python.so"
        if not library.exists():
            pytest.skip(f"{library} does not exist")
        needed = " ".join(symbols(library, "--undefined-only", "--demangle"))
        for pattern in (r"\bat::", r"\bc10::", r"\btorch::", r"\bPy"):
            assert re.search(pattern, needed), pattern

    def test_no_symbol_of_ours_is_exported_but_the_query(self, name: str) -> None:
        """Two libraries in one process cannot catch each other's functions."""
        exported = symbols(built(name), "--defined-only", "--demangle")
        ours = [symbol.split(maxsplit=1)[-1] for symbol in exported if "mmdeform" in symbol]
        query = {"_C_cpu.so": "mmdeform_cpu_capability", "_C_cuda.so": "mmdeform_cuda_archs"}
        assert ours == [query[name]]


def test_compiled_package_does_not_warn() -> None:
    built("_C_cpu.so")
    done = run_python(COMPUTE, MMDEFORM_REQUIRE_EXT="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in CAPABILITIES


def test_operators_work_without_openmmlab() -> None:
    """torch alone is enough for the operators; nothing is said about the missing layers."""
    code = "import sys\nfor name in ('mmcv', 'mmengine', 'mmdet', 'numpy', 'cv2'):\n"
    done = run_python(code + "    sys.modules[name] = None" + COMPUTE)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1


class TestWithoutLibraries:
    def test_computes_with_one_warning(self, source_package: Path) -> None:
        done = run_python(COMPUTE, source_package)
        assert done.returncode == 0, done.stderr
        capability, *warnings = done.stdout.splitlines()
        assert capability == "None"
        assert len(warnings) == 1
        path = source_package / "mmdeform" / "_C_cpu.so"
        assert f"{path} does not exist" in warnings[0]
        assert "python -m mmdeform.doctor" in warnings[0]

    def test_can_be_an_error(self, source_package: Path) -> None:
        done = run_python("import mmdeform", source_package, MMDEFORM_REQUIRE_EXT="1")
        assert done.returncode == 1
        last = done.stderr.splitlines()[-1]
        assert last.startswith("ImportError: mmdeform: ")
        assert "_C_cpu.so does not exist" in last
        assert "MMDEFORM_REQUIRE_EXT=1" in last

    def test_a_broken_library_is_told(self, source_package: Path) -> None:
        (source_package / "mmdeform" / "_C_cpu.so").write_text("not a library")
        done = run_python(COMPUTE, source_package)
        assert done.returncode == 0, done.stderr
        assert "_C_cpu.so cannot be loaded" in done.stdout
        done = run_python("import mmdeform", source_package, MMDEFORM_REQUIRE_EXT="1")
        assert done.returncode == 1
        assert "ImportError" in done.stderr

    def test_a_reference_is_refused_where_kernels_are_required(self, source_package: Path) -> None:
        """The variable is also looked at when an operator is called."""
        code = "import os, mmdeform; os.environ['MMDEFORM_REQUIRE_EXT'] = '1';" + COMPUTE
        done = run_python(code, source_package)
        assert done.returncode == 1
        assert "mmdeform::deform_conv2d has no kernel for cpu" in done.stderr

    def test_another_library_can_be_named(self, source_package: Path) -> None:
        path = built("_C_cpu.so")
        done = run_python(COMPUTE, source_package, MMDEFORM_CPU_LIBRARY=str(path))
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[0] in CAPABILITIES


class TestCapabilities:
    @pytest.mark.parametrize("capability", CAPABILITIES)
    @pytest.mark.slow
    def test_operators(self, capability: str) -> None:
        """The numbers of both operators with the instruction sets that this run does not use."""
        status = _library.status()["cpu"]
        if not status.loaded or "MMDEFORM_CPU_LIBRARY" in os.environ:
            pytest.skip("needs the compiled CPU library")
        if status.capability == capability:
            pytest.skip(f"{capability} is what this run uses")
        self.require(capability)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not cuda",
             "tests/ops/test_deform_conv2d.py", "tests/ops/test_ms_deform_attn.py",
             "-k", "matches_fp64_reference or every_element or memory_layout or TestEdges"],
            cwd=ROOT,
            env={**os.environ, "MMDEFORM_CPU_CAPABILITY": capability,
                 "MMDEFORM_REQUIRE_EXT": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        assert re.search(rf"cpu library: .* \({capability}\)", done.stdout)
        assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 400

    @pytest.mark.parametrize("capability", CAPABILITIES)
    def test_can_be_forced(self, capability: str) -> None:
        self.require(capability)
        done = run_python(COMPUTE, MMDEFORM_CPU_CAPABILITY=capability)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == capability

    def test_an_unknown_one_is_refused(self) -> None:
        built("_C_cpu.so")
        done = run_python("import mmdeform", MMDEFORM_CPU_CAPABILITY="sse9")
        assert done.returncode == 1, done.stderr  # an exception, not a crash
        assert "MMDEFORM_CPU_CAPABILITY: expected default, avx2 or avx512, got sse9" in done.stderr

    @staticmethod
    def require(capability: str) -> None:
        built("_C_cpu.so")
        cpuinfo = Path("/proc/cpuinfo")
        words = cpuinfo.read_text().split() if cpuinfo.exists() else []
        flag = {"default": None, "avx2": "avx2", "avx512": "avx512bw"}[capability]
        if flag is not None and flag not in words:
            pytest.skip(f"this processor has no {capability}")

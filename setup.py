"""Builds the compiled libraries against torch's stable ABI.

One binary serves every torch >= 2.10 and every Python 3, so the libraries are plain shared objects
loaded by ``torch.ops.load_library``; only headers of an installed torch are needed.

Environment variables:
    MMDEFORM_CUDA: ``auto`` (default: build CUDA kernels where nvcc is found), ``0`` or ``1``.
    TORCH_CUDA_ARCH_LIST: as in torch, e.g. ``"8.0;9.0+PTX"``; default ``8.0;8.6;8.9;9.0+PTX``.
    MAX_JOBS: parallel compilations; default: all cores.
    MMDEFORM_SANITIZE: ``1`` builds with AddressSanitizer (see ``make asan``).
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
DEFAULT_CUDA_ARCHS = "8.0;8.6;8.9;9.0+PTX"
# The oldest torch whose stable ABI is used: 2.10.
TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# Kernels are compiled once per instruction set; csrc/cpu/library.cpp chooses at run time.
CPU_CAPABILITIES = {"default": ""}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_CAPABILITIES["avx2"] = "-mavx2 -mfma -mf16c"
    # GCC 12 warns of its own intrinsics' "undefined" operands.
    CPU_CAPABILITIES["avx512"] = (
        "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512 "
        "-Wno-maybe-uninitialized"
    )


def find_torch() -> Path:
    """The folder of the installed torch, also from pip's isolated build environment."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    for key in ("platlib", "purelib"):
        folder = Path(sysconfig.get_path(key)) / "torch"
        if (folder / "include").is_dir():
            return folder
    raise SystemExit("mmdeform needs an installed torch >= 2.10 to build: install torch first.")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))


def wants_cuda() -> bool:
    choice = os.environ.get("MMDEFORM_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"MMDEFORM_CUDA must be auto, 0 or 1, got {choice!r}")
    if choice == "1" and find_nvcc() is None:
        raise SystemExit("MMDEFORM_CUDA=1 but nvcc was not found on PATH or under CUDA_HOME")
    return choice == "1" or (choice == "auto" and find_nvcc() is not None)


def cuda_arch_flags(archs: str) -> list[str]:
    flags = []
    for arch in archs.replace(" ", ";").split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        if not number.rstrip("a").isdigit():
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected e.g. '8.0;9.0+PTX', got {archs!r}")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class NinjaFile:
    """The build description: compile rules with header dependencies, one link step."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lines = ["ninja_required_version = 1.3"]
        self.objects: list[str] = []
        torch = find_torch()
        self.torch_lib = torch / "lib"
        includes = f"-I{ROOT}/csrc -isystem {torch}/include"
        sanitize = "-fsanitize=address -fno-omit-frame-pointer -g " if sanitizing() else ""
        cxx = os.environ.get("CXX", "c++")
        common = f"-std=gnu++17 -O3 {TARGET_VERSION} {includes}"
        self.rule(
            "cxx",
            f"{cxx} -MMD -MF $out.d {common} {sanitize}-fPIC -fvisibility=hidden -Wall "
            "-fno-math-errno -fno-trapping-math $flags -c $in -o $out",
            depfile=True,
        )
        nvcc = find_nvcc()
        if nvcc is not None:
            archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHS
            self.rule(
                "nvcc",
                f"{nvcc} -MMD -MF $out.d {common.replace('gnu++', 'c++')} -DUSE_CUDA "
                f"'-DMMDEFORM_CUDA_ARCHS=\"{archs}\"' {' '.join(cuda_arch_flags(archs))} "
                "-Xcompiler=-fPIC,-fvisibility=hidden --expt-relaxed-constexpr -cudart static "
                "$flags -c $in -o $out",
                depfile=True,
            )
            self.rule("nvlink", f"{nvcc} -shared -cudart static $in $flags -o $out")
        self.rule("link", f"{cxx} -shared {sanitize}$in $flags -o $out")

    def rule(self, name: str, command: str, depfile: bool = False) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, rule: str, source: Path, suffix: str = "", flags: str = "") -> None:
        out = f"{source.stem}{suffix}.{source.parent.name}.o"
        self.objects.append(out)
        self.lines += [f"build {out}: {rule} {source}", f"  flags = {flags}"]

    def run(self, link_rule: str, target: Path, flags: str) -> None:
        self.lines += [
            f"build {target}: {link_rule} {' '.join(self.objects)}",
            f"  flags = {flags}",
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join([*self.lines, ""]))
        jobs = os.environ.get("MAX_JOBS")
        ninja = shutil.which("ninja") or str(Path(sys.executable).with_name("ninja"))
        subprocess.run([ninja, "-C", str(self.folder), *(["-j", jobs] if jobs else [])], check=True)


def sanitizing() -> bool:
    return os.environ.get("MMDEFORM_SANITIZE", "0") == "1"


def build_cpu(folder: Path, target: Path) -> None:
    ninja = NinjaFile(folder)
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        if source.stem.endswith("_kernel"):
            for name, flags in CPU_CAPABILITIES.items():
                ninja.compile(
                    "cxx", source, f".{name}", f"-DMMDEFORM_CPU_CAPABILITY={name} {flags}"
                )
        else:
            defines = " ".join(f"-DMMDEFORM_HAS_{name.upper()}" for name in CPU_CAPABILITIES)
            ninja.compile("cxx", source, flags=defines)
    ninja.run("link", target, f"-L{ninja.torch_lib} -ltorch_cpu")


def build_cuda(folder: Path, target: Path) -> None:
    ninja = NinjaFile(folder)
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        ninja.compile("nvcc", source)
    torch_cuda = ninja.torch_lib / "libtorch_cuda.so"
    if not torch_cuda.exists():
        # A CPU-only torch: name the library as needed through an empty stand-in of the same name.
        torch_cuda = folder / "libtorch_cuda.so"
        folder.mkdir(parents=True, exist_ok=True)
        cxx = os.environ.get("CXX", "c++")
        empty = ["-shared", "-Wl,-soname,libtorch_cuda.so", "-x", "c++", "/dev/null"]
        subprocess.run([cxx, *empty, "-o", str(torch_cuda)], check=True)
    libraries = f"-L{ninja.torch_lib} -L{torch_cuda.parent} -ltorch_cuda -ltorch_cpu"
    ninja.run("nvlink", target, f"-Xlinker --no-as-needed {libraries}")


class BuildKernels(build_ext):
    """Builds by ninja; the extensions are plain libraries, not Python modules."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        name = ext.name.rsplit("_", 1)[-1] + ("-asan" if sanitizing() else "")
        {"cpu": build_cpu, "cuda": build_cuda}[ext.name.rsplit("_", 1)[-1]](
            ROOT / "build" / name, target
        )


class PlatformWheel(bdist_wheel):
    """The libraries do not depend on the Python version: py3-none-<platform>."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


extensions = [Extension("mmdeform._C_cpu", sources=[])]
if wants_cuda():
    extensions.append(Extension("mmdeform._C_cuda", sources=[]))

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)

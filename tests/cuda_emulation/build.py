"""Compiles the CUDA kernels as C++ for the emulator.

The result takes the place of the CPU library::

    MMDEFORM_CPU_LIBRARY=$(python tests/cuda_emulation/build.py) pytest tests/ops

so that operators on CPU tensors run the CUDA kernels. Only a C++ compiler and torch are needed.
Finished builds are kept under ``build/``, named by a hash of everything that went into them.
"""

import argparse
import concurrent.futures
import hashlib
import importlib.util
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
# -fno-strict-aliasing: kernels read neighbours through vector types, as CUDA allows.
# -ffp-contract=off: sums round as written. -U_FORTIFY_SOURCE: fibers jump between stacks.
FLAGS = (
    "-std=gnu++17 -O2 -g1 -fPIC -fvisibility=hidden -fno-strict-aliasing -ffp-contract=off "
    "-U_FORTIFY_SOURCE "
    "-Wall -Wno-unknown-pragmas -DTORCH_TARGET_VERSION=0x020a000000000000 -DUSE_CUDA "
    "-DMMDEFORM_CUDA_DISPATCH_KEY=CPU -DMMDEFORM_CUDA_TILE_BYTES=8192 "
    "-DMMDEFORM_CUDA_SORTED_ENTRIES=1024 -DMMDEFORM_CUDA_DAT_ATTN_BLOCKS=16"
).split()
SANITIZE = ["-fsanitize=address", "-fno-omit-frame-pointer"]


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("the emulator needs an installed torch")
    return Path(spec.origin).parent


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-4000:]}")


def sanitizer_environment() -> dict[str, str]:
    """What an interpreter needs to load libraries built with ``sanitize``."""
    compiler = os.environ.get("CXX", "c++")
    libraries = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    # Leaks of the interpreter are not ours; stacks of fibers are switched as plain memory.
    return {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }


def build(
    sources: Sequence[Path] | None = None,
    name: str = "_C_emulated",
    sanitize: bool = False,
    link_torch: bool = True,
) -> Path:
    """Builds a library of emulated kernels, or finds it built.

    Args:
        sources: Files to compile; None: all CUDA kernels and what stands in for torch's CUDA part.
        name: File name of the library without its suffix.
        sanitize: Build with AddressSanitizer.
        link_torch: Compile and link against torch.

    Returns:
        Path of the library.

    Raises:
        RuntimeError: Compilation failed; holds the compiler's messages.
    """
    if sources is None:
        sources = [*KERNELS, HERE / "emulated_torch_cuda.cpp"]
    compiler = os.environ.get("CXX", "c++")
    flags = [*FLAGS, *(SANITIZE if sanitize else []), f"-I{HERE / 'include'}", f"-I{ROOT / 'csrc'}"]
    link = ["-shared", *(SANITIZE if sanitize else [])]
    digest = hashlib.sha256(repr((compiler, flags)).encode())
    if link_torch:
        torch = _torch()
        flags += ["-isystem", str(torch / "include")]
        # -Bsymbolic: the stand-ins win over functions of the same name in torch.
        link += [f"-L{torch / 'lib'}", "-ltorch_cpu", "-Wl,-Bsymbolic"]
        digest.update((torch / "version.py").read_bytes())
    headers = [*(HERE / "include").glob("*"), *(ROOT / "csrc/common").glob("*")]
    headers += (ROOT / "csrc/cuda").glob("*.cuh")
    for path in sorted([*sources, *headers]):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    folder = HERE / "build" / digest.hexdigest()[:16]
    library = folder / f"{name}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{source.name}.{os.getpid()}.o" for source in sources]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        commands = [
            [compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
            for source, target in zip(sources, objects, strict=True)
        ]
        list(pool.map(_run, commands))
    # Renamed into place, so that nobody loads a half-written library.
    partial = folder / f"{name}.{os.getpid()}.so"
    _run([compiler, *map(str, objects), *link, "-o", str(partial)])
    partial.replace(library)
    for target in objects:
        target.unlink()
    return library


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Builds emulated CUDA kernels; prints the path.")
    parser.add_argument("--sanitize", action="store_true", help="build with AddressSanitizer")
    print(build(sanitize=parser.parse_args().sanitize))

"""The one place that loads the compiled libraries and registers operators.

Schemas and references are defined in Python, so every operator exists before, and without, a
compiled library; loading a library adds the kernels of its device.

Environment variables:
    MMDEFORM_REQUIRE_EXT: ``1`` turns a missing library, and any use of a reference in place of a
        kernel, into an error.
    MMDEFORM_CPU_CAPABILITY: ``default``, ``avx2`` or ``avx512`` forces an instruction set.
    MMDEFORM_CPU_LIBRARY: path of a library to load in place of ``_C_cpu.so``.
"""

import ctypes
import dataclasses
import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._C import DispatchKey
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "mmdeform"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
# Device types on which torch has autocast and on which operators may run.
AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}

_PACKAGE = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class LibraryStatus:
    """What :func:`load` found.

    Attributes:
        path: The library file, whether or not it exists.
        loaded: True if its kernels are registered.
        capability: CPU library: the instruction set chosen (``default``, ``avx2``, ``avx512``).
            CUDA library: the architectures it was built for, e.g. ``8.0;9.0+PTX``.
        problem: Why it is not loaded, or None if it is loaded or not wanted on this machine.
    """

    path: Path
    loaded: bool = False
    capability: str | None = None
    problem: str | None = None


_status: dict[str, LibraryStatus] = {}


def status() -> dict[str, LibraryStatus]:
    """The state of the compiled libraries, by device type (``cpu``, ``cuda``)."""
    return dict(_status)


def require_kernels() -> bool:
    """True if ``MMDEFORM_REQUIRE_EXT=1`` forbids falling back to the references."""
    return os.environ.get("MMDEFORM_REQUIRE_EXT", "0") == "1"


def _load_library(path: Path, capability_symbol: str) -> LibraryStatus:
    if not path.exists():
        return LibraryStatus(path, problem=f"{path} does not exist: it was not built")
    try:
        torch.ops.load_library(str(path))
        query = getattr(ctypes.CDLL(str(path)), capability_symbol)
    except (OSError, RuntimeError, AttributeError) as error:
        return LibraryStatus(path, problem=f"{path} cannot be loaded: {error}")
    query.restype = ctypes.c_char_p
    capability = query().decode()
    if capability.startswith("error: "):
        raise ImportError(capability.removeprefix("error: "))
    return LibraryStatus(path, loaded=True, capability=capability)


def load() -> None:
    """Loads the libraries that fit this torch and reports, once, those that are missing.

    Raises:
        ImportError: A library is missing and ``MMDEFORM_REQUIRE_EXT=1``, or
            ``MMDEFORM_CPU_CAPABILITY`` names an instruction set that is not there.
    """
    cpu_path = Path(os.environ.get("MMDEFORM_CPU_LIBRARY") or _PACKAGE / "_C_cpu.so")
    _status["cpu"] = _load_library(cpu_path, "mmdeform_cpu_capability")
    cuda_path = _PACKAGE / "_C_cuda.so"
    if torch.version.cuda is not None:
        _status["cuda"] = _load_library(cuda_path, "mmdeform_cuda_archs")
    else:
        _status["cuda"] = LibraryStatus(cuda_path)
    problems = [entry.problem for entry in _status.values() if entry.problem is not None]
    if not problems:
        return
    message = f"mmdeform: {'; '.join(problems)}"
    if require_kernels():
        raise ImportError(
            f"{message}. MMDEFORM_REQUIRE_EXT=1 makes this an error; "
            "`MMDEFORM_REQUIRE_EXT=0 python -m mmdeform.doctor` tells how to get the kernels."
        )
    warnings.warn(
        f"{message}. The slow reference operators are used there; "
        "`python -m mmdeform.doctor` tells how to get the kernels.",
        stacklevel=2,
    )


@functools.cache
def _warn_reference(name: str, device_type: str) -> None:
    # load() has already told of a missing library of these devices.
    if _status.get(device_type, LibraryStatus(Path())).problem is None:
        warnings.warn(
            f"mmdeform::{name} has no kernel for {device_type}: the slow reference is used.",
            stacklevel=3,
        )


def register(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int],
) -> None:
    """Defines an operator that computes on every device by its reference.

    Args:
        schema: Name, arguments and returns, without the namespace.
        reference: Implementation in PyTorch with the schema's arguments; serves every device for
            which no kernel is registered.
        fake: Shapes and dtypes of the results (``torch.library.register_fake``).
        flops: FLOP formula on shapes (``torch.utils.flop_counter.register_flop_formula``).
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def fallback(*args: Any) -> Any:
        device_type = next(arg.device.type for arg in args if isinstance(arg, torch.Tensor))
        if require_kernels():
            raise RuntimeError(
                f"mmdeform::{name} has no kernel for {device_type} and MMDEFORM_REQUIRE_EXT=1"
            )
        _warn_reference(name, device_type)
        return reference(*args)

    LIBRARY.impl(name, fallback, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    register_flop_formula(getattr(torch.ops.mmdeform, name))(flops)


def register_gradient(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Gives operator ``name`` its gradient, and its ``_backward`` operator a clear refusal."""
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )

    def refuse(*_: Any) -> None:
        raise RuntimeError(
            f"{name}: double backward is not implemented; call the first backward without "
            "create_graph=True"
        )

    torch.library.register_autograd(f"{NAMESPACE}::{name}_backward", refuse, lib=LIBRARY)


def register_autocast(name: str, cast: Callable[..., tuple]) -> None:
    """Makes ``name`` run in the autocast dtype.

    Args:
        name: The operator.
        cast: ``cast(dtype, *args) -> args`` with the data tensors brought to ``dtype``.
    """
    operator = getattr(torch.ops.mmdeform, name)
    for device_type, key in AUTOCAST_KEYS.items():

        def call(*args: Any, device_type: str = device_type) -> Any:
            args = cast(torch.get_autocast_dtype(device_type), *args)
            with torch.autocast(device_type, enabled=False):
                return operator(*args)

        LIBRARY.impl(name, call, key)


def autocast_tensor(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Casts as autocast does: floating-point tensors except fp64."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def has_kernel(name: str, device_type: str) -> bool:
    """False if operator ``name`` falls back to its reference on devices of this type."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        f"{NAMESPACE}::{name}", device_type.upper()
    )


# What torch.compiler.assume_constant_result does, without importing all of torch's compiler.
vars(has_kernel)["_dynamo_marked_constant"] = True


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of coordinates and sums: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reference_gradients(
    function: Callable[..., torch.Tensor],
    grad_output: torch.Tensor,
    inputs: tuple[torch.Tensor | None, ...],
) -> tuple[torch.Tensor, ...]:
    """Gradients of a reference by autograd; an absent input gets an empty tensor."""
    # Inside an operator's kernel autograd is switched off; here it is the implementation.
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (DispatchKey.AutogradFunctionality, DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        wanted = [leaf for leaf in leaves if leaf is not None]
        output = function(*leaves)
        grads = iter(torch.autograd.grad(output, wanted, grad_output, allow_unused=True))
    results = []
    for leaf in leaves:
        if leaf is None:
            results.append(grad_output.new_empty(0))
            continue
        grad = next(grads)
        results.append(torch.zeros_like(leaf) if grad is None else grad.contiguous())
    return tuple(results)

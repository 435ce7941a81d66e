"""The gate before the clock: results against the reference in fp64 on the measured data itself."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .case import Inputs, Operator

__all__ = ["TOLERANCES", "Error", "call_with_gradients", "compare", "reference_results"]

# Largest accepted `Error.worst`: some ten roundings of a 16-bit dtype; for the others as much as
# coordinates of some hundred pixels lose.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 5e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}
# The same with TF32 products, whose 10 bits of mantissa are those of fp16.
TF32_TOLERANCE = 1e-2


@dataclasses.dataclass(frozen=True)
class Error:
    """Distance of a tensor x from its reference r.

    Attributes:
        worst: Largest ``|x - r| / (rms(r) + |r|)`` of all elements.
        norm: ``rms(x - r) / rms(r)``. Near 1 where x has nothing to do with r.
    """

    worst: float
    norm: float


def call_with_gradients(
    function: Callable[..., Tensor],
    inputs: Inputs,
    grad_output: Tensor,
    constants: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Calls an implementation and differentiates it.

    Args:
        function: Of the inputs by name.
        inputs: Arguments; gradients are those of all floating-point tensors.
        grad_output: Shape of the output.
        constants: Floating-point tensors without a gradient.

    Returns:
        ``output``, and ``grad_<name>`` for each input that the output depends on.
    """
    leaves = differentiable(inputs, constants)
    output = function(**{**inputs, **leaves})
    grads = torch.autograd.grad(output, list(leaves.values()), grad_output, allow_unused=True)
    results = {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {
        "output": output.detach(),
        **{name: grad for name, grad in results.items() if grad is not None},
    }


def differentiable(inputs: Inputs, constants: tuple[str, ...]) -> dict[str, Tensor]:
    """The floating-point tensors among inputs, as leaves that require gradients."""
    return {
        name: value.detach().requires_grad_()
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point() and name not in constants
    }


def reference_results(operator: Operator, inputs: Inputs, grad_output: Tensor) -> dict[str, Tensor]:
    """As :func:`call_with_gradients` of the reference, in fp64 and piece by piece.

    The inputs are those that are measured, after rounding to their dtypes: what is compared is the
    computation alone, and all of it.

    Raises:
        ValueError: ``grad_output`` has another shape than the output.
    """
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    leaves = differentiable(wide, operator.constants)
    output = grad_output.new_zeros(grad_output.shape, dtype=torch.float64)
    for piece, place in operator.split({**wide, **leaves}):
        with torch.enable_grad():
            part = operator.reference(**piece)
        if part.shape != grad_output[place].shape:
            shape = tuple(grad_output.shape)
            raise ValueError(f"output: expected {tuple(part.shape)} at {place}, got {shape}")
        part.backward(grad_output[place].double())
        output[place] = part.detach()
    grads = {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
    return {"output": output, **grads}


def compare(results: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Error]:
    """Errors of results by name.

    Raises:
        ValueError: A reference is zero or not finite (nothing would be checked), or a result is
            missing or has another shape.
    """
    return {name: _error(name, results.get(name), value) for name, value in expected.items()}


def _error(name: str, actual: Tensor | None, expected: Tensor) -> Error:
    scale = expected.square().mean().sqrt().item()
    if not 0 < scale < math.inf:
        raise ValueError(f"{name}: the reference must be finite and not zero, its rms is {scale}")
    if actual is None or actual.shape != expected.shape:
        shape = None if actual is None else tuple(actual.shape)
        raise ValueError(f"{name}: expected shape {tuple(expected.shape)}, got {shape}")
    difference = actual.double() - expected
    worst = (difference.abs() / (expected.abs() + scale)).max().item()
    norm = difference.square().mean().sqrt().item() / scale
    return Error(*(value if math.isfinite(value) else math.inf for value in (worst, norm)))

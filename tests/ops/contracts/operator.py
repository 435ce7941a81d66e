"""The description of an operator on which the contract tests work."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import mmdeform.ops
from mmdeform.ops._library import accumulation_dtype

Arguments = dict[str, Any]

# Dtypes of data and of coordinates: all six pairs that kernels know.
TYPES = {
    "fp64": (torch.float64, torch.float64),
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16-fp32": (torch.float16, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
}

# Relative to the largest entry of the result. A kernel may round each sampled value to the data
# dtype once, and rounds its result once: four units of roundoff. fp32 sums are longer than that.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4 * 2.0**-11,
    torch.bfloat16: 4 * 2.0**-8,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of the public function, made on demand.

    Attributes:
        make: Returns the arguments; floating-point tensors in fp64 on the CPU, values of order 1,
            samples at least 0.1 pixels off integer lines.
        emulated: Small enough for the emulated CUDA kernels (a few thousand output elements).
    """

    make: Callable[[], Arguments]
    emulated: bool = True


class Operator:
    """Describes an operator; the base of all contract classes.

    Attributes:
        name: Name of the public function and of the schema.
        data: Arguments that share the data dtype.
        coordinates: Arguments that have the data dtype or its accumulation dtype.
        boxes: Arguments that always have the accumulation dtype, and no gradient.
        backward_returns: Arguments whose gradients ``<name>_backward`` returns, in order.
        cases: By id; ``"asymmetric"`` and ``"tiny"`` must be among them, with every optional
            argument present; ``gradcheck`` runs the tiny one once for each of its numbers.
    """

    name: ClassVar[str]
    data: ClassVar[tuple[str, ...]]
    coordinates: ClassVar[tuple[str, ...]]
    boxes: ClassVar[tuple[str, ...]] = ()
    backward_returns: ClassVar[tuple[str, ...]]
    cases: ClassVar[dict[str, Case]]

    @staticmethod
    def schema_arguments(arguments: Arguments) -> tuple:
        """Arguments of ``torch.ops.mmdeform.<name>`` for those of the public function."""
        raise NotImplementedError

    def backward_arguments(
        self, grad_output: Tensor, arguments: Arguments, deterministic: bool = False
    ) -> tuple:
        """Arguments of ``torch.ops.mmdeform.<name>_backward``."""
        return (grad_output, *self.schema_arguments(arguments), deterministic)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            metafunc.parametrize(
                "case",
                [
                    pytest.param(case, id=key, marks=[pytest.mark.emulated] * case.emulated)
                    for key, case in self.cases.items()
                ],
            )
        if "argument" in metafunc.fixturenames:
            metafunc.parametrize("argument", self.data + self.coordinates)
        if "types" in metafunc.fixturenames:
            metafunc.parametrize("types", TYPES.values(), ids=TYPES)

    @property
    def function(self) -> Callable[..., Tensor]:
        return getattr(mmdeform.ops, self.name)

    @property
    def schema(self) -> Any:
        return getattr(torch.ops.mmdeform, self.name)

    @property
    def backward_schema(self) -> Any:
        return getattr(torch.ops.mmdeform, self.name + "_backward")

    def reference(self, arguments: Arguments) -> Tensor:
        reference = getattr(mmdeform.ops, self.name + "_reference")
        return reference(*self.schema_arguments(arguments))

    def differentiable(self, arguments: Arguments) -> list[str]:
        """Names of the arguments that are present and have gradients."""
        return [key for key in self.data + self.coordinates if arguments[key] is not None]

    def place(
        self,
        arguments: Arguments,
        types: tuple[torch.dtype, torch.dtype] = TYPES["fp32"],
        device: str = "cpu",
        requires_grad: bool = True,
    ) -> Arguments:
        """Copies the arguments to a device, in the data and coordinate dtypes ``types``."""
        placed = {}
        for key, value in arguments.items():
            if isinstance(value, Tensor):
                value = value.detach().to(device)
            if isinstance(value, Tensor) and value.is_floating_point():
                dtype = types[0] if key in self.data else types[1]
                if key in self.boxes:
                    dtype = accumulation_dtype(types[0])
                value = (
                    value.to(dtype)
                    .clone(memory_format=torch.contiguous_format)
                    .requires_grad_(requires_grad and key not in self.boxes)
                )
            placed[key] = value
        return placed

    def run(
        self, function: Callable[[Arguments], Tensor], arguments: Arguments, grad_output: Tensor
    ) -> dict[str, Tensor]:
        """The output, under the key ``"output"``, and every gradient."""
        output = function(arguments)
        keys = self.differentiable(arguments)
        grads = torch.autograd.grad(output, [arguments[key] for key in keys], grad_output)
        return {"output": output.detach(), **dict(zip(keys, grads, strict=True))}

    def call(self, arguments: Arguments) -> Tensor:
        return self.function(**arguments)

    def grad_output(self, arguments: Arguments) -> Tensor:
        """A random gradient of the output, of its shape and dtype."""
        with torch.no_grad():
            return torch.randn_like(self.call(arguments))


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Compares results of :meth:`Operator.run` with those in fp64 within ``dtype``'s tolerance."""
    assert actual.keys() == expected.keys()
    for key, wanted in expected.items():
        wanted = wanted.double().cpu()
        scale = wanted.abs().max().item() if wanted.numel() else 0.0
        torch.testing.assert_close(
            actual[key].double().cpu(),
            wanted,
            rtol=0,
            atol=TOLERANCES[dtype] * max(scale, 1e-30),
            msg=lambda text, key=key: f"{key}: {text}",
        )


def off_integer_lines(*size: int, low: int = -2, high: int = 2) -> Tensor:
    """Random fp64 numbers in [low, high + 1], at least 0.15 away from every integer."""
    return torch.randint(low, high + 1, size) + 0.15 + 0.7 * torch.rand(size, dtype=torch.float64)


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values in memory layouts other than contiguous."""
    reversed_axes = tuple(range(tensor.dim()))[::-1]
    sliced = tensor.new_full([2 * size + 1 for size in tensor.shape], float("nan"))
    sliced = sliced[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)
    result = {
        "transposed": tensor.permute(reversed_axes).contiguous().permute(reversed_axes),
        "sliced": sliced,
    }
    if tensor.dim() == 4:
        result["channels_last"] = tensor.contiguous(memory_format=torch.channels_last)
    return result

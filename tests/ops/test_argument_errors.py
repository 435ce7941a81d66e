"""What cannot work is refused with the argument's name, what was expected and what came.

The lists of what each operator refuses are in argument_errors/<operator>.py.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from .argument_errors import ArgumentErrors, all_errors
from .contracts.operator import Arguments, Operator

ALL_ERRORS = all_errors()


def parameters(kind: str) -> list:
    """(operator, change, message) for all operators' errors of one kind."""
    return [
        pytest.param(errors.operator, *error, id=f"{errors.operator.name}-{error[1]}")
        for errors in ALL_ERRORS
        for error in getattr(errors, kind)
    ]


def test_every_operator_has_errors() -> None:
    schemas = torch._C._dispatch_get_all_op_names()
    names = {name.removeprefix("mmdeform::") for name in schemas if name.startswith("mmdeform::")}
    operators = {name.removesuffix("_backward") for name in names}
    assert {errors.operator.name for errors in ALL_ERRORS} == operators
    assert all(errors.public for errors in ALL_ERRORS)


@pytest.mark.parametrize(("operator", "change", "message"), parameters("public"))
def test_public_function_refuses(operator: Operator, change: Callable, message: str) -> None:
    arguments = operator.place(operator.cases["asymmetric"].make(), requires_grad=False)
    with pytest.raises(ValueError, match="^" + message):
        operator.call({**arguments, **change(arguments)})


def direct_arguments(operator: Operator, name: str, device: str = "cpu") -> Arguments:
    """The asymmetric case's arguments of the schema ``name``, by the names they have there."""
    arguments = operator.place(operator.cases["asymmetric"].make(), device=device)
    values = operator.schema_arguments(arguments)
    if name.endswith("_backward"):
        values = operator.backward_arguments(operator.grad_output(arguments), arguments)
    schema = getattr(torch.ops.mmdeform, name).default._schema
    return {
        argument.name: value.detach() if isinstance(value, Tensor) else value
        for argument, value in zip(schema.arguments, values, strict=True)
    }


def grown(tensor: Tensor, axis: int) -> Tensor:
    return torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)


def changes(errors: ArgumentErrors, name: str) -> Iterator[tuple[str, str, Callable]]:
    """Every tensor with an axis less, an axis more, each axis longer, another dtype; numbers."""
    for key, value in direct_arguments(errors.operator, name).items():
        for number in errors.numbers.get(key, ()):
            yield key, str(number), lambda _, number=number: number
        if not isinstance(value, Tensor):
            continue
        yield key, "an axis less", lambda tensor: tensor[0]
        yield key, "an axis more", lambda tensor: tensor[None]
        yield key, "complex64", lambda tensor: tensor.to(torch.complex64)
        if value.is_floating_point():
            yield key, "fp64", Tensor.double
            yield key, "int64", Tensor.long
        else:
            yield key, "int32", Tensor.int
        for axis in range(value.dim()):
            if (name, key, axis) not in errors.valid:
                yield key, f"axis {axis} longer", lambda tensor, axis=axis: grown(tensor, axis)


def direct_calls() -> list:
    return [
        pytest.param(errors.operator, name, key, change, id=f"{name}-{key}-{text}")
        for errors in ALL_ERRORS
        for name in (errors.operator.name, errors.operator.name + "_backward")
        for key, text, change in changes(errors, name)
    ]


@pytest.mark.emulated
@pytest.mark.parametrize(("operator", "name", "key", "change"), direct_calls())
def test_direct_call_refuses(
    operator: Operator, name: str, key: str, change: Callable, kernel_device: str
) -> None:
    """Kernels check what they are given, before they read it."""
    arguments = direct_arguments(operator, name, kernel_device)
    schema = getattr(torch.ops.mmdeform, name)
    schema(*arguments.values())  # works as it is
    arguments[key] = change(arguments[key])
    with pytest.raises(RuntimeError, match=r"expected .* got|expected on"):
        schema(*arguments.values())


@pytest.mark.emulated
@pytest.mark.parametrize("suffix", ["", "_backward"], ids=["forward", "backward"])
@pytest.mark.parametrize(("operator", "change", "message"), parameters("direct"))
def test_direct_call_refuses_this(
    operator: Operator, change: Callable, message: str, suffix: str, kernel_device: str
) -> None:
    arguments = direct_arguments(operator, operator.name + suffix, kernel_device)
    arguments.update(change(arguments))
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.mmdeform, operator.name + suffix)(*arguments.values())


@pytest.mark.parametrize("suffix", ["", "_backward"], ids=["forward", "backward"])
@pytest.mark.parametrize(("operator", "change", "message"), parameters("values"))
def test_values_are_refused(
    operator: Operator, change: Callable, message: str, suffix: str, kernel_device: str
) -> None:
    if kernel_device == "cuda":
        pytest.skip("a CUDA kernel cannot look at values without waiting for the device")
    arguments = direct_arguments(operator, operator.name + suffix)
    arguments.update(change(arguments))
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.mmdeform, operator.name + suffix)(*arguments.values())

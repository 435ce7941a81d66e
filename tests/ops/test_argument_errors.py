"""What cannot work is refused with the argument's name, what was expected and what came."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from . import test_deform_conv2d, test_ms_deform_attn
from .contracts.operator import Arguments, Operator

CONV, ATTENTION = test_deform_conv2d.TestContract(), test_ms_deform_attn.TestContract()
Change = Callable[[Arguments], dict[str, Any]]

# Changes to the asymmetric case, (2, 6, 7, 6) -> (2, 10, 3, 5), and the error that they cause.
CONV_ERRORS: list[tuple[Change, str]] = [
    (lambda a: {"stride": 0}, r"stride: expected an integer or .* each >= 1, got 0"),
    (lambda a: {"stride": 1.5}, r"stride: expected an integer or .*, got 1.5"),
    (lambda a: {"stride": (1, 2, 3)}, r"stride: expected .*, got \(1, 2, 3\)"),
    (lambda a: {"padding": (0, -1)}, r"padding: expected .* each >= 0, got \(0, -1\)"),
    (lambda a: {"dilation": [1, 0]}, r"dilation: expected .* each >= 1, got \[1, 0\]"),
    (lambda a: {"input": a["input"][0]}, r"input: expected .*\(N, C, H, W\), got \(6, 7, 6\)"),
    (lambda a: {"weight": a["weight"][0]}, r"weight: expected shape .*, got \(3, 3, 2\)"),
    (lambda a: {"offset": a["offset"][0]}, r"offset: expected shape .*, got \(36, 3, 5\)"),
    (
        lambda a: {"input": a["input"][:, :5]},
        r"weight: expected C/G .* divide the 5 channels of input, got \(10, 3, 3, 2\)",
    ),
    (lambda a: {"weight": a["weight"][:, :0]}, r"weight: .*, got \(10, 0, 3, 2\)"),
    (
        lambda a: {"weight": a["weight"][:9]},
        r"weight: expected O .* divisible by 2 groups, got \(9, 3, 3, 2\)",
    ),
    (
        lambda a: {"offset": a["offset"][:, :35]},
        r"offset: expected .* multiple of 2\*Kh\*Kw = 12, got \(2, 35, 3, 5\)",
    ),
    (lambda a: {"offset": a["offset"][:, :0]}, r"offset: expected .*, got \(2, 0, 3, 5\)"),
    (
        lambda a: {"offset": torch.cat([a["offset"], a["offset"][:, :12]], 1)},
        r"offset: expected deform groups that divide the 6 channels of input, got 4",
    ),
    (lambda a: {"input": a["input"][:, :, :2]}, r"input: \(2, 6, 2, 6\) is smaller than"),
    (
        lambda a: {"offset": a["offset"][:, :, :2]},
        r"offset: expected shape \(2, 36, 3, 5\), got \(2, 36, 2, 5\)",
    ),
    (
        lambda a: {"offset": a["offset"].transpose(2, 3)},
        r"offset: expected shape \(2, 36, 3, 5\), got \(2, 36, 5, 3\)",
    ),
    (lambda a: {"offset": a["offset"][:1]}, r"offset: expected .*, got \(1, 36, 3, 5\)"),
    (
        lambda a: {"mask": a["mask"][:, :6]},
        r"mask: expected shape \(2, 18, 3, 5\), got \(2, 6, 3, 5\)",
    ),
    (lambda a: {"mask": a["mask"][0]}, r"mask: expected shape .*, got \(18, 3, 5\)"),
    (lambda a: {"bias": a["bias"][:1]}, r"bias: expected shape \(10,\), got \(1,\)"),
    (lambda a: {"input": a["input"].long()}, r"input: expected a floating.*, got torch.int64"),
    (
        lambda a: {"weight": a["weight"].half()},
        r"weight: expected torch.float32 as input, got torch.float16",
    ),
    (
        lambda a: {"bias": a["bias"].double()},
        r"bias: expected torch.float32 as input, got torch.float64",
    ),
    *(
        (lambda a, key=key: {key: a[key].to("meta")}, rf"{key}: expected on cpu.*, got meta")
        for key in ("offset", "weight", "bias", "mask")
    ),
]

# Changes to the asymmetric case: value (2, 38, 3, 5), locations (2, 7, 3, 2, 3, 2).
ATTENTION_ERRORS: list[tuple[Change, str]] = [
    (
        lambda a: {"value": a["value"][0]},
        r"value: expected shape \(N, S, M, Dh\), got \(38, 3, 5\)",
    ),
    (
        lambda a: {"sampling_locations": a["sampling_locations"][0]},
        r"sampling_locations: expected shape \(N, Lq, M, L, P, 2\), got \(7, 3, 2, 3, 2\)",
    ),
    (
        lambda a: {"sampling_locations": a["sampling_locations"].repeat(*[1] * 5, 2)},
        r"sampling_locations: expected shape .*, got \(2, 7, 3, 2, 3, 4\)",
    ),
    (
        lambda a: {"sampling_locations": a["sampling_locations"][:1]},
        r"sampling_locations: expected N = 2 and M = 3 .*, got \(1, 7, 3, 2, 3, 2\)",
    ),
    (
        lambda a: {"sampling_locations": a["sampling_locations"][:, :, :2]},
        r"sampling_locations: expected N = 2 and M = 3 .*, got \(2, 7, 2, 2, 3, 2\)",
    ),
    (
        lambda a: {"attention_weights": a["attention_weights"].flatten(3)},
        r"attention_weights: expected .* \(2, 7, 3, 2, 3\), got \(2, 7, 3, 6\)",
    ),
    (
        lambda a: {"attention_weights": a["attention_weights"][:, :5]},
        r"attention_weights: expected .* \(2, 7, 3, 2, 3\), got \(2, 5, 3, 2, 3\)",
    ),
    (
        lambda a: {"spatial_shapes": a["spatial_shapes"][:1]},
        r"spatial_shapes: expected int64 of shape .* \(2, 2\), got torch.int64 of shape \(1, 2\)",
    ),
    (
        lambda a: {"spatial_shapes": a["spatial_shapes"][0], "level_start_index": None},
        r"spatial_shapes: expected int64 of shape .* \(2, 2\), got .* \(2,\)",
    ),
    (
        lambda a: {"spatial_shapes": a["spatial_shapes"].int()},
        r"spatial_shapes: expected int64 .*, got torch.int32",
    ),
    (
        lambda a: {"level_start_index": a["level_start_index"][:1]},
        r"level_start_index: expected int64 of shape .* \(2,\), got .* \(1,\)",
    ),
    (
        lambda a: {"level_start_index": a["level_start_index"].float()},
        r"level_start_index: expected int64 .*, got torch.float32",
    ),
    (lambda a: {"value": a["value"].int()}, r"value: expected a floating-.*, got torch.int32"),
    *(
        (lambda a, key=key: {key: a[key].to("meta")}, rf"{key}: expected on cpu.*, got meta")
        for key in (
            "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights"
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("operator", "change", "message"),
    [(CONV, *error) for error in CONV_ERRORS] + [(ATTENTION, *error) for error in ATTENTION_ERRORS],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "name", ""),
)
def test_public_function_refuses(operator: Operator, change: Change, message: str) -> None:
    arguments = operator.place(operator.cases["asymmetric"].make(), requires_grad=False)
    with pytest.raises(ValueError, match="^" + message):
        operator.call({**arguments, **change(arguments)})


def grown(tensor: Tensor, axis: int) -> Tensor:
    return torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)


# Grown axes that make another, valid call: a row below the last tap, tokens behind the last level
# and, where there is no grad_output yet, more channels per head.
VALID = {
    ("deform_conv2d", "input", 2),
    ("deform_conv2d_backward", "input", 2),
    ("ms_deform_attn", "value", 1),
    ("ms_deform_attn_backward", "value", 1),
    ("ms_deform_attn", "value", 3),
}
NUMBERS = {
    "stride": ([1], [0, 1], [2, -1], []),
    "padding": ([1], [-1, 0], [1, 0, 0]),
    "dilation": ([1], [0, 1], [2, -1]),
    "groups": (0, -1, 5, 1),
    "deform_groups": (0, -1, 4, 1),
}


def direct_calls() -> list:
    """Every tensor with an axis less, an axis more, each axis longer, another dtype; and so on."""
    calls = []
    for operator in (CONV, ATTENTION):
        for name, schema in ((operator.name, operator.schema),
                             (operator.name + "_backward", operator.backward_schema)):  # fmt: skip
            arguments = operator.place(operator.cases["asymmetric"].make())
            values = operator.schema_arguments(arguments)
            if name.endswith("_backward"):
                values = operator.backward_arguments(operator.grad_output(arguments), arguments)
            for i, argument in enumerate(schema.default._schema.arguments):
                changes: dict[str, Any] = {}
                if isinstance(values[i], Tensor):
                    changes = {"an axis less": lambda t: t[0], "an axis more": lambda t: t[None],
                               "another dtype": lambda t: t.to(torch.complex64)}  # fmt: skip
                    if values[i].is_floating_point():
                        changes["fp64"] = Tensor.double
                        changes["int64"] = Tensor.long
                    else:
                        changes["int32"] = Tensor.int
                    for axis in range(values[i].dim()):
                        if (name, argument.name, axis) not in VALID:
                            changes[f"axis {axis} longer"] = lambda t, axis=axis: grown(t, axis)
                for number in NUMBERS.get(argument.name, ()):
                    changes[str(number)] = lambda _, number=number: number
                for key, change in changes.items():
                    calls.append(
                        pytest.param(operator, name, i, change, id=f"{name}-{argument.name}-{key}")
                    )
    return calls


@pytest.mark.emulated
@pytest.mark.parametrize(("operator", "name", "position", "change"), direct_calls())
def test_direct_call_refuses(
    operator: Operator, name: str, position: int, change: Callable, kernel_device: str
) -> None:
    """Kernels check what they are given, before they read it."""
    arguments = operator.place(operator.cases["asymmetric"].make(), device=kernel_device)
    values = list(operator.schema_arguments(arguments))
    if name.endswith("_backward"):
        values = list(operator.backward_arguments(operator.grad_output(arguments), arguments))
    values = [v.detach() if isinstance(v, Tensor) else v for v in values]
    schema = getattr(torch.ops.mmdeform, name)
    schema(*values)  # works as it is
    values[position] = change(values[position])
    with pytest.raises(RuntimeError, match=r"expected .* got|expected on"):
        schema(*values)


@pytest.mark.emulated
def test_direct_call_refuses_a_kernel_larger_than_the_input(kernel_device: str) -> None:
    """Also where the division by the stride would round a negative room up to zero."""
    image, offset, weight = (
        torch.randn(shape, device=kernel_device)
        for shape in ((1, 1, 2, 2), (1, 18, 1, 1), (1, 1, 3, 3))
    )
    with pytest.raises(RuntimeError, match=r"input: \(1, 1, 2, 2\) is smaller than the kernel"):
        torch.ops.mmdeform.deform_conv2d(
            image, offset, None, weight, None, [2, 2], [0, 0], [1, 1], 1, 1
        )


@pytest.mark.parametrize(
    ("spatial_shapes", "level_start_index"),
    [
        ([[5, 4], [3, 6]], [0, 21]),
        ([[5, 4], [3, 6]], [-1, 20]),
        ([[5, 4], [3, 6]], [0, 2**62]),
        ([[5, 4], [3, 7]], [0, 20]),
        ([[-5, -4], [3, 6]], [0, 20]),
        ([[5, 4], [-3, 6]], [0, 20]),
        ([[2**32, 2**32], [3, 6]], [0, 20]),
        ([[2**62, 4], [3, 6]], [0, 20]),
    ],
    ids=str,
)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_levels_outside_value_are_refused(
    spatial_shapes: list, level_start_index: list, backward: bool, kernel_device: str
) -> None:
    if kernel_device == "cuda":
        pytest.skip("the CUDA kernel cannot look at the levels without waiting for the device")
    arguments = ATTENTION.place(ATTENTION.cases["asymmetric"].make(), requires_grad=False)
    grad_output = ATTENTION.grad_output(arguments)
    arguments["spatial_shapes"] = torch.tensor(spatial_shapes)
    arguments["level_start_index"] = torch.tensor(level_start_index)
    with pytest.raises(RuntimeError, match=r"spatial_shapes|level_start_index"):
        if backward:
            ATTENTION.backward_schema(*ATTENTION.backward_arguments(grad_output, arguments))
        else:
            ATTENTION.call(arguments)

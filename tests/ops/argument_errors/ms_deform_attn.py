"""What ms_deform_attn refuses.

The asymmetric case has value (2, 38, 3, 5) and sampling_locations (2, 7, 3, 2, 3, 2).
"""

import torch

from ..test_ms_deform_attn import TestContract
from . import ArgumentErrors

# Levels that reach outside the 38 tokens of value.
LEVELS = [
    ([[5, 4], [3, 6]], [0, 21]),
    ([[5, 4], [3, 6]], [-1, 20]),
    ([[5, 4], [3, 6]], [0, 2**62]),
    ([[5, 4], [3, 7]], [0, 20]),
    ([[-5, -4], [3, 6]], [0, 20]),
    ([[5, 4], [-3, 6]], [0, 20]),
    ([[2**32, 2**32], [3, 6]], [0, 20]),
    ([[2**62, 4], [3, 6]], [0, 20]),
]

ERRORS = ArgumentErrors(
    operator=TestContract(),
    public=[
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
            r"spatial_shapes: expected int64 of shape .* \(2, 2\), got .* of shape \(1, 2\)",
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
                "spatial_shapes",
                "level_start_index",
                "sampling_locations",
                "attention_weights",
            )
        ),
    ],
    values=[
        (
            lambda a, shapes=shapes, starts=starts: {
                "spatial_shapes": torch.tensor(shapes),
                "level_start_index": torch.tensor(starts),
            },
            "(spatial_shapes|level_start_index): expected",
        )
        for shapes, starts in LEVELS
    ],
    # Tokens behind the last level and, where there is no grad_output yet, channels per head.
    valid=frozenset(
        {
            ("ms_deform_attn", "value", 1),
            ("ms_deform_attn_backward", "value", 1),
            ("ms_deform_attn", "value", 3),
        }
    ),
)

"""What deform_conv2d refuses. The asymmetric case is (2, 6, 7, 6) -> (2, 10, 3, 5)."""

import torch

from ..test_deform_conv2d import TestContract
from . import ArgumentErrors

ERRORS = ArgumentErrors(
    operator=TestContract(),
    public=[
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
    ],
    direct=[
        # The room of -1 row divided by the stride 2 would be rounded up to zero.
        (
            lambda a: {
                "input": a["input"][:, :, :0],
                **{k: a[k][:, :, :1] for k in ("offset", "mask")},
            },
            r"input: \(2, 6, 0, 6\) is smaller than the kernel",
        ),
    ],
    numbers={
        "stride": ([1], [0, 1], [2, -1], []),
        "padding": ([1], [-1, 0], [1, 0, 0]),
        "dilation": ([1], [0, 1], [2, -1]),
        "groups": (0, -1, 5, 1),
        "deform_groups": (0, -1, 4, 1),
    },
    # A row below the last tap.
    valid=frozenset({("deform_conv2d", "input", 2), ("deform_conv2d_backward", "input", 2)}),
)

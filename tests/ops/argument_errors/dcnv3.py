"""What dcnv3 refuses. The asymmetric case has input (2, 7, 6, 15) and offset (2, 3, 5, 36)."""

import math

from ..test_dcnv3 import TestContract
from . import ArgumentErrors, Error

# What dcnv4 refuses as well.
GEOMETRY: list[Error] = [
    (lambda a: {"kernel_size": 0}, r"kernel_size: expected .* each >= 1, got 0"),
    (lambda a: {"kernel_size": (3, 2, 1)}, r"kernel_size: expected .*, got \(3, 2, 1\)"),
    (lambda a: {"stride": 0}, r"stride: expected an integer or .* each >= 1, got 0"),
    (lambda a: {"stride": 1.5}, r"stride: expected an integer or .*, got 1.5"),
    (lambda a: {"padding": (0, -1)}, r"padding: expected .* each >= 0, got \(0, -1\)"),
    (lambda a: {"dilation": [1, 0]}, r"dilation: expected .* each >= 1, got \[1, 0\]"),
    (lambda a: {"groups": 0}, r"groups: expected a divisor of the 15 channels .*, got 0"),
    (lambda a: {"groups": 4}, r"groups: expected a divisor of the 15 channels .*, got 4"),
    (lambda a: {"groups": 3.0}, r"groups: expected a divisor of the 15 channels .*, got 3.0"),
    (lambda a: {"offset_scale": math.nan}, r"offset_scale: expected a finite number, got nan"),
    (lambda a: {"offset_scale": math.inf}, r"offset_scale: expected a finite number, got inf"),
    (lambda a: {"offset_scale": "1"}, r"offset_scale: expected a finite number, got 1"),
    (
        lambda a: {"remove_center": True},
        r"kernel_size: expected an odd square kernel with remove_center, got \(3, 2\)",
    ),
    (
        lambda a: {"remove_center": True, "kernel_size": 4},
        r"kernel_size: expected an odd square kernel with remove_center, got \(4, 4\)",
    ),
    (lambda a: {"input": a["input"][0]}, r"input: expected .*\(N, H, W, C\), got \(7, 6, 15\)"),
    (lambda a: {"input": a["input"].long()}, r"input: expected a floating.*, got torch.int64"),
    (
        lambda a: {"input": a["input"][:, :2]},
        r"input: \(2, 2, 6, 15\) is smaller than a kernel of \(3, 2\)",
    ),
]
NUMBERS = {
    "kernel_size": ([3], [0, 2], [3, -2], [2, 3]),
    "stride": ([1], [0, 1], [2, -1], []),
    "padding": ([1], [-1, 0], [1, 0, 0]),
    "dilation": ([1], [0, 1], [2, -1]),
    "groups": (0, -1, 4, 1),
    "offset_scale": (math.nan, math.inf),
    "remove_center": (True,),
}

ERRORS = ArgumentErrors(
    operator=TestContract(),
    public=[
        *GEOMETRY,
        (
            lambda a: {"offset": a["offset"][:, :2]},
            r"offset: expected shape \(2, 3, 5, 36\), got \(2, 2, 5, 36\)",
        ),
        (
            lambda a: {"offset": a["offset"].transpose(1, 2)},
            r"offset: expected shape \(2, 3, 5, 36\), got \(2, 5, 3, 36\)",
        ),
        (
            lambda a: {"offset": a["offset"][..., :35]},
            r"offset: expected shape \(2, 3, 5, 36\), got \(2, 3, 5, 35\)",
        ),
        (lambda a: {"offset": a["offset"][:1]}, r"offset: expected .*, got \(1, 3, 5, 36\)"),
        (lambda a: {"offset": a["offset"][0]}, r"offset: expected .*, got \(3, 5, 36\)"),
        (
            lambda a: {"mask": a["mask"][..., :6]},
            r"mask: expected shape \(2, 3, 5, 18\), got \(2, 3, 5, 6\)",
        ),
        (lambda a: {"mask": a["mask"][0]}, r"mask: expected shape .*, got \(3, 5, 18\)"),
        *(
            (lambda a, key=key: {key: a[key].to("meta")}, rf"{key}: expected on cpu.*, got meta")
            for key in ("offset", "mask")
        ),
    ],
    direct=[
        # The room of -1 row divided by the stride 2 would be rounded up to zero.
        (
            lambda a: {
                "input": a["input"][:, :2],
                **{key: a[key][:, :1] for key in ("offset", "mask")},
            },
            r"input: \(2, 2, 6, 15\) is smaller than a kernel of \(3, 2\)",
        ),
    ],
    numbers=NUMBERS,
    # A row below the last tap.
    valid=frozenset({("dcnv3", "input", 1), ("dcnv3_backward", "input", 1)}),
)

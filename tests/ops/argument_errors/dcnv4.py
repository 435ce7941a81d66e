"""What dcnv4 refuses. The asymmetric case has input (2, 7, 6, 15), offset_mask (2, 3, 5, 56)."""

from ..test_dcnv4 import TestContract
from . import ArgumentErrors
from .dcnv3 import GEOMETRY, NUMBERS

ERRORS = ArgumentErrors(
    operator=TestContract(),
    public=[
        *GEOMETRY,
        (
            lambda a: {"offset_mask": a["offset_mask"][..., :54]},
            r"offset_mask: expected shape \(2, 3, 5, 56\), 3 channels for each of 18 points "
            r"rounded up to a multiple of 8, got \(2, 3, 5, 54\)",
        ),
        (
            lambda a: {"offset_mask": a["offset_mask"].transpose(1, 2)},
            r"offset_mask: expected shape \(2, 3, 5, 56\), .*, got \(2, 5, 3, 56\)",
        ),
        (
            lambda a: {"offset_mask": a["offset_mask"][:1]},
            r"offset_mask: expected .*, got \(1, 3, 5, 56\)",
        ),
        (
            lambda a: {"offset_mask": a["offset_mask"][0]},
            r"offset_mask: expected .*, got \(3, 5, 56\)",
        ),
        (
            lambda a: {"offset_mask": a["offset_mask"].to("meta")},
            r"offset_mask: expected on cpu.*, got meta",
        ),
    ],
    direct=[
        # The room of -1 row divided by the stride 2 would be rounded up to zero.
        (
            lambda a: {"input": a["input"][:, :2], "offset_mask": a["offset_mask"][:, :1]},
            r"input: \(2, 2, 6, 15\) is smaller than a kernel of \(3, 2\)",
        ),
    ],
    numbers=NUMBERS,
    # A row below the last tap.
    valid=frozenset({("dcnv4", "input", 1), ("dcnv4_backward", "input", 1)}),
)

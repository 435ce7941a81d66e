"""What dat_attn refuses.

The asymmetric case has query (2, 4, 5, 5, 7), key and value (2, 4, 5, 11), positions (2, 2, 11, 2)
and table (4, 9, 13).
"""

import math

from ..test_dat_attn import TestContract
from . import ArgumentErrors

ERRORS = ArgumentErrors(
    operator=TestContract(),
    public=[
        (
            lambda a: {"query": a["query"][0]},
            r"query: expected shape \(B, M, Dh, H, W\) with Dh > 0, got \(4, 5, 5, 7\)",
        ),
        (lambda a: {"query": a["query"][:, :, :0]}, r"query: expected .*, got \(2, 4, 0, 5, 7\)"),
        (
            lambda a: {"key": a["key"][:, :, :4]},
            r"key: expected shape .* \(2, 4, 5, Ns > 0\), got \(2, 4, 4, 11\)",
        ),
        (lambda a: {"key": a["key"][..., None]}, r"key: expected .*, got \(2, 4, 5, 11, 1\)"),
        (lambda a: {"key": a["key"][..., :0]}, r"key: expected .*Ns > 0.*, got \(2, 4, 5, 0\)"),
        (
            lambda a: {"value": a["value"][..., 1:]},
            r"value: expected \(2, 4, 5, 11\) as key, got \(2, 4, 5, 10\)",
        ),
        (
            lambda a: {"positions": a["positions"][:, :, 1:]},
            r"positions: expected shape .* \(2, G, 11, 2\), got \(2, 2, 10, 2\)",
        ),
        (
            lambda a: {"positions": a["positions"].transpose(2, 3)},
            r"positions: expected shape .*, got \(2, 2, 2, 11\)",
        ),
        (
            lambda a: {"positions": a["positions"][:1]},
            r"positions: expected shape .*, got \(1, 2, 11, 2\)",
        ),
        (
            lambda a: {"positions": a["positions"].repeat(1, 2, 1, 1)[:, :3]},
            r"positions: expected groups that divide the 4 heads of query, got 3",
        ),
        (lambda a: {"positions": a["positions"][:, :0]}, r"positions: expected groups .* got 0"),
        (
            lambda a: {"table": a["table"][:3]},
            r"table: expected shape .* \(4, Th > 0, Tw > 0\), got \(3, 9, 13\)",
        ),
        (lambda a: {"table": a["table"][0]}, r"table: expected shape .*, got \(9, 13\)"),
        (lambda a: {"table": a["table"][:, :, :0]}, r"table: expected .*, got \(4, 9, 0\)"),
        (lambda a: {"scale": math.nan}, r"scale: expected a finite number, got nan"),
        (
            lambda a: {"backend": "cuda"},
            r"backend: expected one of auto, fused, reference, got 'cuda'",
        ),
        *(
            (lambda a, key=key: {key: a[key].int()}, rf"{key}: expected a floating.*torch.int32")
            for key in ("query", "key", "value", "positions", "table")
        ),
        *(
            (
                lambda a, key=key: {key: a[key].half()},
                rf"{key}: expected torch.float32 as query, got torch.float16",
            )
            for key in ("key", "value")
        ),
        *(
            (lambda a, key=key: {key: a[key].to("meta")}, rf"{key}: expected on cpu.*, got meta")
            for key in ("key", "value", "positions", "table")
        ),
    ],
    direct=[
        (
            lambda a: (
                {key: a[key][..., :0] for key in ("key", "value")}
                | {"positions": a["positions"][:, :, :0]}
            ),
            r"key: expected at least one key",
        ),
        (lambda a: {"positions": a["positions"][:, :0]}, r"positions: expected groups .* got 0"),
        (lambda a: {"table": a["table"][:, :, :0]}, r"table: expected at least one cell"),
    ],
    numbers={"scale": (math.nan, math.inf)},
    # More cells, and where there is no grad_output yet, more queries.
    valid=frozenset(
        {(name, "table", axis) for name in ("dat_attn", "dat_attn_backward") for axis in (1, 2)}
        | {("dat_attn", "query", 3), ("dat_attn", "query", 4)}
    ),
)

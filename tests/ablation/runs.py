"""Runs whose statistics can be told by heart."""

import math

from mmdeform.ablation.results import RowResult

AP = "coco/bbox_mAP"
ERROR = "Traceback:\n```\nRuntimeError: <loss> & | NaN"


def runs() -> list[RowResult]:
    """Rows with three equal and unequal seeds, one seed, NaN, and nothing finished."""
    mdconv = {"kernel": "mdconv", "stages": "c5"}
    rows = [
        ("base", {"kernel": "conv", "stages": "-"}, {0: 0.1, 1: 0.2, 2: 0.3}, 9),
        ("wide </script>&|", mdconv, {0: 0.3, 1: 0.3, 3: 0.6}, 10),
        ("single", {"kernel": "dcnv3"}, {0: 0.5}, 11),
        ("diverged", {"kernel": "dcnv4"}, {0: math.nan, 1: 0.15}, 12),
    ]
    found = [
        RowResult(
            row=row,
            labels=labels,
            is_base=row == "base",
            seed=seed,
            status="finished",
            metrics={AP: value, "coco/bbox_mAP_50": value + 0.25},
            curves={
                AP: [(1, value / 4), (2, value / 2), (3, value)],
                "loss": [(epoch, 1 / epoch) for epoch in (1, 2, 3)],
            },
            parameters=millions * 10**6,
            macs=2_500_000_000,
            latency_ms=9.0 if row == "single" else 10.0 + seed,
            peak_memory_bytes=3 * 2**20,
        )
        for row, labels, seeds, millions in rows
        for seed, value in seeds.items()
    ]
    failed = RowResult(
        row="broken",
        labels={"kernel": "dconv"},
        is_base=False,
        seed=0,
        status="failed",
        # Of the last validation before the failure.
        metrics={AP: 0.9},
        curves={"loss": [(1, math.nan)]},
        parameters=100_000_000,
        error=ERROR,
    )
    running = RowResult("broken", {"kernel": "dconv"}, False, 1, "running")
    return [*found, failed, running]

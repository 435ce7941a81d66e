"""What deform_ps_roi_pool refuses. The asymmetric case is (2, 24, 7, 9), 6 RoIs -> (6, 6, 3, 2)."""

import math

from ..test_deform_ps_roi_pool import TestContract
from . import ArgumentErrors
from .deform_roi_pool import with_image

NUMBERS = ("output_dim", "group_size", "part_size", "sample_per_part")

ERRORS = ArgumentErrors(
    operator=TestContract(),
    public=[
        (lambda a: {"input": a["input"][0]}, r"input: expected .*\(N, C, H, W\).*, got \(24, 7, 9"),
        (
            lambda a: {"input": a["input"][..., :0]},
            r"input: expected .* H, W > 0, got \(2, 24, 7, 0",
        ),
        (lambda a: {"input": a["input"].long()}, r"input: expected a floating.*, got torch.int64"),
        (
            lambda a: {"input": a["input"][:, :23]},
            r"input: expected output_dim \* group_size\*\*2 = 24 channels, got \(2, 23, 7, 9\)",
        ),
        (lambda a: {"group_size": 3}, r"input: expected .* = 54 channels, got \(2, 24, 7, 9\)"),
        (lambda a: {"output_dim": 24}, r"input: expected .* = 96 channels, got \(2, 24, 7, 9\)"),
        (lambda a: {"rois": a["rois"][0]}, r"rois: expected shape \(R, 5\), got \(5,\)"),
        (lambda a: {"rois": a["rois"].long()}, r"rois: expected a floating.*, got torch.int64"),
        (
            lambda a: {"rois": a["rois"][:5]},
            r"offset: expected shape .* \(5, 2\*K, 3, 3\), got \(6, 6, 3, 3\)",
        ),
        (lambda a: {"output_size": (0, 2)}, r"output_size: expected .* each >= 1, got \(0, 2\)"),
        *(
            (lambda a, key=key: {key: 0}, rf"{key}: expected an integer >= 1, got 0")
            for key in NUMBERS
        ),
        (lambda a: {"sample_per_part": 2.5}, r"sample_per_part: expected an integer .*, got 2.5"),
        (
            lambda a: {"part_size": 2},
            r"offset: expected shape \(R, 2\*K, part_size, part_size\) = \(6, 2\*K, 2, 2\), got",
        ),
        (lambda a: {"offset": a["offset"][0]}, r"offset: expected shape .*, got \(6, 3, 3\)"),
        (lambda a: {"offset": a["offset"][:, :5]}, r"offset: expected 2\*K .*, got \(6, 5, 3, 3\)"),
        (lambda a: {"offset": a["offset"][:, :0]}, r"offset: expected 2\*K .*, got \(6, 0, 3, 3\)"),
        (
            lambda a: {"offset": a["offset"].repeat(1, 2, 1, 1)[:, :8]},
            r"offset: expected 2\*K channels with K dividing output_dim = 6, got \(6, 8, 3, 3\)",
        ),
        (
            lambda a: {"offset": a["offset"].int()},
            r"offset: expected a floating.*, got torch.int32",
        ),
        *(
            (lambda a, key=key: {key: a[key].to("meta")}, rf"{key}: expected on cpu.*, got meta")
            for key in ("rois", "offset")
        ),
    ],
    direct=[
        (lambda a: {"input": a["input"][:, :, :0]}, r"input: expected at least one pixel"),
        (lambda a: {"rois": a["rois"].half()}, r"rois: expected the dtype of .* Float, got Half"),
        (lambda a: {"input": a["input"][:, :23]}, r"input: expected output_dim \* group_size\*\*2"),
        (
            lambda a: {"offset": a["offset"].repeat(1, 2, 1, 1)[:, :8]},
            r"offset: expected 2\*K channels with K dividing output_dim 6, got \(6, 8, 3, 3\)",
        ),
        (lambda a: {"offset": a["offset"][:, :0]}, r"offset: expected 2\*K channels"),
    ],
    values=[
        (lambda a, i=i: with_image(a, i), r"rois: expected image indices in \[0, 2\), got .* row 4")
        for i in (2, -1, -0.5, 2**31, 1e30, math.nan, math.inf, -math.inf)
    ],
    numbers={
        "output_size": ([3], [3, 2, 1], [0, 2], [3, -1], [2**24, 2], []),
        **{key: (0, -1, 2**24) for key in NUMBERS},
    },
    # More images and more or fewer pixels.
    valid=frozenset(
        (name, "input", axis)
        for name in ("deform_ps_roi_pool", "deform_ps_roi_pool_backward")
        for axis in (0, 2, 3)
    ),
)

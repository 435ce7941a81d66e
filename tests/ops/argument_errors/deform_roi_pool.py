"""What deform_roi_pool refuses. The asymmetric case is (2, 5, 7, 9), 6 RoIs -> (6, 5, 3, 2)."""

import math

import torch

from ..contracts.operator import Arguments
from ..test_deform_roi_pool import TestContract
from . import ArgumentErrors


def with_image(arguments: Arguments, index: float) -> Arguments:
    rois = arguments["rois"].clone()
    rois[4, 0] = index
    return {"rois": rois}


ERRORS = ArgumentErrors(
    operator=TestContract(),
    public=[
        (lambda a: {"input": a["input"][0]}, r"input: expected .*\(N, C, H, W\).*, got \(5, 7, 9"),
        (lambda a: {"input": a["input"][:, :, :0]}, r"input: expected .* H, W > 0, got \(2, 5, 0"),
        (lambda a: {"input": a["input"][..., :0]}, r"input: expected .* W > 0, got \(2, 5, 7, 0"),
        (lambda a: {"input": a["input"].long()}, r"input: expected a floating.*, got torch.int64"),
        (lambda a: {"rois": a["rois"][0]}, r"rois: expected shape \(R, 5\), got \(5,\)"),
        (lambda a: {"rois": a["rois"][:, :4]}, r"rois: expected shape \(R, 5\), got \(6, 4\)"),
        (lambda a: {"rois": a["rois"].long()}, r"rois: expected a floating.*, got torch.int64"),
        (
            lambda a: {"rois": a["rois"][:5]},
            r"offset: expected shape .* \(5, 2, 3, 2\), got \(6, 2, 3, 2\)",
        ),
        (lambda a: {"output_size": 0}, r"output_size: expected .* each >= 1, got 0"),
        (lambda a: {"output_size": (3, 2, 1)}, r"output_size: expected .*, got \(3, 2, 1\)"),
        (lambda a: {"output_size": (3, 2.0)}, r"output_size: expected .*, got \(3, 2.0\)"),
        (
            lambda a: {"output_size": (2, 3)},
            r"offset: expected shape \(R, 2, Ph, Pw\) = \(6, 2, 2, 3\), got \(6, 2, 3, 2\)",
        ),
        (lambda a: {"sampling_ratio": -1}, r"sampling_ratio: expected an integer >= 0, got -1"),
        (lambda a: {"sampling_ratio": 1.5}, r"sampling_ratio: expected an integer >= 0, got 1.5"),
        (
            lambda a: {"offset": a["offset"].flatten(1, 2)},
            r"offset: expected shape .* \(6, 2, 3, 2\), got \(6, 6, 2\)",
        ),
        (lambda a: {"offset": a["offset"].int()}, r"offset: expected a fl.*, got torch.int32"),
        (lambda a: {"mask": a["mask"].int()}, r"mask: expected a floating.*, got torch.int32"),
        (
            lambda a: {"mask": a["mask"][:, None]},
            r"mask: expected shape \(R, Ph, Pw\) = \(6, 3, 2\), got \(6, 1, 3, 2\)",
        ),
        (
            lambda a: {"mask": a["mask"][:5], "offset": None},
            r"mask: expected shape .* \(6, 3, 2\), got \(5, 3, 2\)",
        ),
        *(
            (lambda a, key=key: {key: a[key].to("meta")}, rf"{key}: expected on cpu.*, got meta")
            for key in ("rois", "offset", "mask")
        ),
    ],
    direct=[
        (lambda a: {"input": a["input"][:, :, :0]}, r"input: expected at least one pixel"),
        (lambda a: {"rois": a["rois"].half()}, r"rois: expected the dtype of .* Float, got Half"),
        (
            lambda a: {"offset": None, "mask": a["mask"].double()},
            r"mask: expected the dtype of .* Float, got Double",
        ),
    ],
    values=[
        (lambda a, i=i: with_image(a, i), r"rois: expected image indices in \[0, 2\), got .* row 4")
        for i in (2, -1, -0.5, 2**31, 1e30, math.nan, math.inf, -math.inf)
    ]
    + [
        (
            lambda a: {"input": a["input"][:0], "rois": torch.zeros_like(a["rois"])},
            r"rois: expected image indices in \[0, 0\)",
        )
    ],
    numbers={
        "output_size": ([3], [3, 2, 1], [0, 2], [3, -1], [2, 3], [2**24, 2], []),
        "sampling_ratio": (-1, 2**24),
    },
    # More images and more or fewer pixels; without grad_output also more channels.
    valid=frozenset(
        {(name, "input", axis) for name in ("deform_roi_pool", "deform_roi_pool_backward")
         for axis in (0, 2, 3)} | {("deform_roi_pool", "input", 1)}
    ),
)  # fmt: skip

"""Benchmark cases and peers of deform_ps_roi_pool."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mmdeform import ops

from .case import Case, Inputs, Operator, Peer

__all__ = ["OPERATOR", "make_case"]

_BINS = 7
_TRANS_STD = 0.1
_STRIDE = 16


def make_case(
    name: str,
    height: int,
    width: int,
    *,
    output_dim: int,
    classes: int,
    rois: int = 300,
    batches: dict[str, tuple[int, ...]] | None = None,
) -> Case:
    """A branch of R-FCN: 7 x 7 bins, cells and parts, 4 x 4 samples per bin, stride 16.

    Args:
        name: Name of the case.
        height: Rows of the score maps.
        width: Columns of the score maps.
        output_dim: Channels of the output.
        classes: Classes with offsets of their own.
        rois: Number of RoIs, spread over the images; bins of 1 to 4 pixels of the map.
        batches: See :class:`Case`.
    """

    def make(batch: int, generator: torch.Generator) -> Inputs:
        def random(sample: Callable[..., Tensor], *shape: int) -> Tensor:
            return sample(shape, generator=generator, dtype=torch.float64)

        # Samples lie at start + n / 4 pixels of the map; starts an eighth of a pixel off keep them
        # off integer lines.
        bins = torch.randint(1, 5, (rois, 2), generator=generator).double()  # (x, y)
        room = (torch.tensor([width, height]) - _BINS * bins).clamp(min=0)
        start = ((random(torch.rand, rois, 2) * room).floor() + 0.125) * _STRIDE
        corners = torch.cat((start, start + _BINS * bins * _STRIDE - 1), 1)
        image = torch.arange(rois, dtype=torch.float64).mul(batch / rois).floor()[:, None]
        pixels = (8 * random(torch.randn, rois, classes, 2, _BINS, _BINS)).round() / 4
        size = _TRANS_STD * _BINS * bins[:, None, :, None, None]
        return {
            "input": random(torch.randn, batch, output_dim * _BINS**2, height, width),
            "rois": torch.cat((image, corners), 1),
            "offset": (pixels / size).flatten(1, 2),
            "output_size": (_BINS, _BINS),
            "spatial_scale": 1 / _STRIDE,
            "output_dim": output_dim,
            "group_size": _BINS,
            "part_size": _BINS,
            "sample_per_part": 4,
            "trans_std": _TRANS_STD,
        }

    return Case(name, make, batches or {})


def _split(inputs: Inputs) -> Iterator[tuple[Inputs, tuple[slice, ...]]]:
    for first in range(0, len(inputs["rois"]), 64):
        piece = slice(first, first + 64)
        parts = {name: inputs[name][piece] for name in ("rois", "offset")}
        yield {**inputs, **parts}, (piece,)


def _samples(inputs: Inputs) -> int:
    bins = len(inputs["rois"]) * _BINS * _BINS
    return bins * inputs["sample_per_part"] ** 2 * inputs["output_dim"]


def _load_reference(device_type: str) -> Callable[..., Tensor]:
    return ops.deform_ps_roi_pool_reference


_BOTH = {"cpu": (1,), "cuda": (2,)}

OPERATOR = Operator(
    name="deform_ps_roi_pool",
    function=ops.deform_ps_roi_pool,
    reference=ops.deform_ps_roi_pool_reference,
    coordinates=("offset",),
    constants=("rois",),
    split=_split,
    samples=_samples,
    # None of the packages that are looked for elsewhere has this operator.
    peers=(Peer("reference", _load_reference, coordinates_as_data=False, copies=10),),
    cases=(
        make_case("classes-81-50x84", 50, 84, output_dim=81, classes=81, batches={"cuda": (2,)}),
        make_case("classes-21-50x84", 50, 84, output_dim=21, classes=21, batches={"cpu": (1,)}),
        make_case("boxes-8-50x84", 50, 84, output_dim=8, classes=1, batches=_BOTH),
    ),
)

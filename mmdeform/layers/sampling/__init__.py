"""Where a deformable layer samples: one answer for every class, ours and mmcv's.

    layers = deformable_layers(model, "backbone.**")
    handles = watch_sampling(layers, lambda name, sampling: print(name, sampling.locations))

Everything that looks at offsets, locations or masks asks here. Another class of layers joins by a
function under ``@sampling_of.register(ItsClass)``. Subclasses are included, and whether mmcv's
classes run on mmcv's kernels or on ours makes no difference. Only modules can be asked: not mmdet's
TOOD, which calls ``deform_conv2d`` itself; nor mmcv's SAConv2d, which samples twice.
"""

from . import attention, convolutions, roi_pooling  # what each class of layers answers  # noqa: F401
from .convolutions import as_mmcv_reads
from .core import (
    Sampling,
    call_arguments,
    deformable_layers,
    is_deformable,
    sampled,
    sampling_of,
    watch_sampling,
)

__all__ = [
    "Sampling",
    "as_mmcv_reads",
    "call_arguments",
    "deformable_layers",
    "is_deformable",
    "sampled",
    "sampling_of",
    "watch_sampling",
]

"""What a model costs: FLOPs, parameters, latency, memory.

inputs = make_inputs(detector, shape=(800, 1333))
with fixed_proposals(detector, 1000):  # of a two-stage detector
    result = complexity(detector, *inputs.args, **inputs.kwargs)
result.total.macs, result.parts(depth=1), result.missing()
"""

from .cost import Latency, latency, peak_bytes, weight_bytes
from .count import KINDS, Complexity, Part, complexity, kind_of
from .inputs import Inputs, config_shape, make_inputs
from .proposals import count_rois, fixed_proposals, proposals_of

__all__ = [
    "KINDS",
    "Complexity",
    "Inputs",
    "Latency",
    "Part",
    "complexity",
    "config_shape",
    "count_rois",
    "fixed_proposals",
    "kind_of",
    "latency",
    "make_inputs",
    "peak_bytes",
    "proposals_of",
    "weight_bytes",
]

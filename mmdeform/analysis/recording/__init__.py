"""What the deformable layers of a model sample in a forward pass, in pixels of the image.

    with record(detector) as recording:
        detector.test_step(batch)
    for call in recording:
        print(call.name, call.kind, call.locations.shape)
    samples = recording["backbone.layer4.2.conv2"].samples(output=17)
    samples.points, samples.weights  # of one output

One contract for all families: see :class:`LayerCall`. Another class of layers joins by
``sampling_of`` (:mod:`mmdeform.layers.sampling`) and, unless it is a convolution, ``call_of``.
"""

from .calls import (
    KINDS,
    AttentionCall,
    ConvolutionCall,
    KeysCall,
    LayerCall,
    RoIPoolingCall,
    Samples,
    call_of,
)
from .pixel_grid import GridTracer, PixelGrid, normalized_grid
from .recorder import Recording, record

__all__ = [
    "KINDS",
    "AttentionCall",
    "ConvolutionCall",
    "GridTracer",
    "KeysCall",
    "LayerCall",
    "PixelGrid",
    "Recording",
    "RoIPoolingCall",
    "Samples",
    "call_of",
    "normalized_grid",
    "record",
]

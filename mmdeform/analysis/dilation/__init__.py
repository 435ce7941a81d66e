"""Effective dilation of deformable convolutions by layer and size of object, over many images.

    dilation = EffectiveDilation(detector)
    for index in range(100):
        dilation.add_image(dataset.get_data_info(index))
    for row in dilation.rows():
        print(row.layer, {name: (spread.mean, spread.std) for name, spread in row.classes.items()})

The effective dilation of a filter is the mean distance between its adjacent sampling locations, 12
pairs in a 3x3 kernel: without offsets it is the dilation. Modulation does not count. Source:
"Deformable Convolutional Networks", table 2.
"""

from .filters import adjacent_taps, effective_dilation
from .measure import EffectiveDilation
from .objects import CLASSES, object_classes, size_classes
from .spread import LayerDilation, Spread

__all__ = [
    "CLASSES",
    "EffectiveDilation",
    "LayerDilation",
    "Spread",
    "adjacent_taps",
    "effective_dilation",
    "object_classes",
    "size_classes",
]

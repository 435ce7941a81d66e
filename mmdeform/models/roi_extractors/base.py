"""What the RoI extractors add to mmdet's."""

import inspect
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import mmcv.ops
from torch import Tensor, nn

from mmdeform.registry import MODELS

__all__ = ["RegistryRoILayers", "keep_graph", "roi_layer_class"]


class RegistryRoILayers:
    """Lets ``roi_layer.type`` be anything that a registry knows, beside the layers of mmcv.ops."""

    def build_roi_layers(
        self, layer_cfg: dict[str, Any], featmap_strides: Sequence[int]
    ) -> nn.ModuleList:
        """Builds a RoI layer per level.

        Args:
            layer_cfg: Config of the layer, without ``spatial_scale``. Its ``type`` is a class, a
                name in ``mmcv.ops`` such as 'RoIAlign', or any name that a ``type`` of a config may
                have, such as 'mmdeform.DeformRoIPoolPack'.
            featmap_strides: Stride of each level in pixels of the image.

        Returns:
            The layers, in the order of the levels.

        Raises:
            KeyError: There is no such layer.
        """
        kwargs = dict(layer_cfg)
        layer = roi_layer_class(kwargs.pop("type"))
        return nn.ModuleList(layer(spatial_scale=1 / s, **kwargs) for s in featmap_strides)


def roi_layer_class(kind: str | type[nn.Module]) -> type[nn.Module]:
    """The class that ``roi_layer.type`` names.

    Raises:
        KeyError: There is no such layer.
    """
    if not isinstance(kind, str):
        return kind
    layer = getattr(mmcv.ops, kind, None)  # holds functions, too
    if not inspect.isclass(layer):
        with MODELS.switch_scope_and_registry(None) as registry:  # of the default scope
            layer = registry.get(kind)
    if layer is None:
        raise KeyError(
            f"roi_layer.type: expected a class, a layer of mmcv.ops or a registered name such as "
            f"'mmdeform.DeformRoIPoolPack', got {kind!r}"
        )
    return layer


def keep_graph(roi_feats: Tensor, *used: Iterable[Tensor]) -> Tensor:
    """Makes the features depend on tensors without changing them.

    Where no RoI falls on a level, its feature map and the parameters of its layer need a gradient
    all the same, of zero: training on several devices waits for it. The sum of no elements is zero
    even where a tensor holds infinities.
    """
    nothing = sum(tensor[None][:0].sum().to(roi_feats.dtype) for tensor in itertools.chain(*used))
    return roi_feats + nothing

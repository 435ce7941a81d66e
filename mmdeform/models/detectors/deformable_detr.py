"""Deformable DETR whose attention is chosen by the config.

Source: Zhu et al., "Deformable DETR" (2021), https://arxiv.org/abs/2010.04159; the detector is
mmdet's.
"""

import copy
import inspect
from typing import Any

from mmcv.ops import MultiScaleDeformableAttention
from mmdet.models.detectors import DeformableDETR as MMDetDeformableDETR
from torch import Tensor

from mmdeform.registry import MODELS

__all__ = ["DeformableDETR"]

_MMCV_ARGUMENTS = set(inspect.signature(MultiScaleDeformableAttention).parameters)


@MODELS.register_module()
class DeformableDETR(MMDetDeformableDETR):
    """mmdet's Deformable DETR on the operator of this package.

    mmdet's layers create mmcv's attention class by name. Here the configs of the attention modules,
    ``encoder.layer_cfg.self_attn_cfg`` and ``decoder.layer_cfg.cross_attn_cfg``, may have a
    ``type`` like everything else, and arguments that mmcv's class does not know. State dicts are
    the same as mmdet's. Two-stage detectors may have any number of channels; mmdet's own work with
    256 only.

    Args: those of mmdet's ``DeformableDETR``. The type of the attention modules is
        ``mmdeform.MultiScaleDeformableAttention`` by default.
    """

    def _init_layers(self) -> None:
        # Copies: mmdet keeps the dicts, and a config may share one among several places.
        self.encoder, self.decoder = copy.deepcopy(self.encoder), copy.deepcopy(self.decoder)
        self_attn_cfg = self.encoder["layer_cfg"]["self_attn_cfg"]
        cross_attn_cfg = self.decoder["layer_cfg"]["cross_attn_cfg"]
        own = [_pop_own_arguments(cfg) for cfg in (self_attn_cfg, cross_attn_cfg)]
        super()._init_layers()
        for layer in self.encoder.layers:
            layer.self_attn = MODELS.build({**self_attn_cfg, **own[0]})
        for layer in self.decoder.layers:
            layer.cross_attn = MODELS.build({**cross_attn_cfg, **own[1]})

    def get_proposal_pos_embed(self, proposals: Tensor, temperature: int = 10000) -> Tensor:
        """Encodes proposals as the positions of the queries that start from them (two-stage).

        Args:
            proposals: Boxes (x, y, w, h) before the sigmoid, shape (N, Lq, 4).
            temperature: Base of the wave lengths.

        Returns:
            Shape (N, Lq, 2 * C): mmdet's encoding, whose length is fixed there to C = 256.
        """
        return super().get_proposal_pos_embed(proposals, self.embed_dims // 2, temperature)


def _pop_own_arguments(cfg: dict[str, Any]) -> dict[str, Any]:
    """Takes the type and what mmcv's class does not know: mmdet creates that one first."""
    own = {key: cfg.pop(key) for key in set(cfg) - _MMCV_ARGUMENTS}
    return {"type": "mmdeform.MultiScaleDeformableAttention", **own}

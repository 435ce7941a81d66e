"""Deformable DETR whose attention is chosen by the config.

Source: Zhu et al., "Deformable DETR" (2021), https://arxiv.org/abs/2010.04159; the detector is
mmdet's.
"""

import copy
from typing import Any

from mmdet.models.detectors import DeformableDETR as MMDetDeformableDETR
from torch import Tensor, nn

from mmdeform.registry import MODELS

__all__ = ["DeformableDETR"]


@MODELS.register_module()
class DeformableDETR(MMDetDeformableDETR):
    """mmdet's Deformable DETR on the operator of this package.

    mmdet's layers create mmcv's attention class by name. Here the configs of the attention modules,
    ``encoder.layer_cfg.self_attn_cfg`` and ``decoder.layer_cfg.cross_attn_cfg``, may have a
    ``type`` like everything else. State dicts are the same as mmdet's. Two-stage detectors may have
    any number of channels; mmdet's own work with 256 only.

    Args: those of mmdet's ``DeformableDETR``. The type of the attention modules is
        ``mmdeform.MultiScaleDeformableAttention`` by default.
    """

    def _init_layers(self) -> None:
        # Copies: mmdet keeps the dicts, and a config may share one among several places.
        self.encoder, self.decoder = copy.deepcopy(self.encoder), copy.deepcopy(self.decoder)
        self_attn_cfg = self.encoder["layer_cfg"]["self_attn_cfg"]
        cross_attn_cfg = self.decoder["layer_cfg"]["cross_attn_cfg"]
        types = [
            cfg.pop("type", "mmdeform.MultiScaleDeformableAttention")
            for cfg in (self_attn_cfg, cross_attn_cfg)
        ]
        super()._init_layers()
        for layer in self.encoder.layers:
            layer.self_attn = _build_attention(types[0], self_attn_cfg)
        for layer in self.decoder.layers:
            layer.cross_attn = _build_attention(types[1], cross_attn_cfg)

    def get_proposal_pos_embed(self, proposals: Tensor, temperature: int = 10000) -> Tensor:
        """Encodes proposals as the positions of the queries that start from them (two-stage).

        Args:
            proposals: Boxes (x, y, w, h) before the sigmoid, shape (N, Lq, 4).
            temperature: Base of the wave lengths.

        Returns:
            Shape (N, Lq, 2 * C): mmdet's encoding, whose length is fixed there to C = 256.
        """
        return super().get_proposal_pos_embed(proposals, self.embed_dims // 2, temperature)


def _build_attention(kind: str | type, cfg: dict[str, Any]) -> nn.Module:
    return MODELS.build(dict(cfg, type=kind))

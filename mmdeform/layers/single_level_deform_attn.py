"""Deformable self-attention in which every query samples the feature map it belongs to.

The encoder of Deformable DETR without multi-scale attention: one side of the paper's ablation. The
authors released no code for it; this is the attention of one level (L = 1), applied to each level.

Source: Zhu et al., "Deformable DETR" (2021), https://arxiv.org/abs/2010.04159, table 2.
"""

from typing import Any

import torch
from torch import Tensor

from mmdeform.ops import ms_deform_attn
from mmdeform.registry import MODELS

from .ms_deform_attn import MultiScaleDeformableAttention

__all__ = ["SingleLevelDeformableAttention"]


@MODELS.register_module()
class SingleLevelDeformableAttention(MultiScaleDeformableAttention):
    """Self-attention over feature maps of several sizes that does not mix them.

    Takes the place of ``MultiScaleDeformableAttention`` in an encoder, where the queries are the
    tokens of all levels, one level after the other: Lq = S. A query of level l samples P points of
    level l, and its weights are softmaxed over these P. Feature maps of any number and size can be
    given. The layer is called as ``MultiScaleDeformableAttention`` is; of a query's L reference
    points the one of its level counts, and ``level_start_index`` is not used.

    All levels share one set of parameters, as in multi-scale attention. The state dict has its
    names, and its shapes for L = 1: ``sampling_offsets`` (M*P*2, C), ``attention_weights``
    (M*P, C), ``value_proj`` and ``output_proj``. With P = 1 the one weight is always 1, and
    ``attention_weights`` learns nothing.

    The sizes of the maps are read on the host: a call waits for the device, and ``torch.compile``
    breaks its graph here.

    Args:
        num_levels: Levels that one query samples. Default and only value: 1.
        **kwargs: The other arguments of ``MultiScaleDeformableAttention``, such as ``embed_dims``,
            ``num_heads`` and ``num_points``.

    Raises:
        ValueError: ``num_levels`` is not 1, or channels are not divisible by the heads.
    """

    def __init__(self, *, num_levels: int = 1, **kwargs: Any) -> None:
        if num_levels != 1:
            raise ValueError(
                f"{type(self).__name__}: num_levels must be 1, got {num_levels}; a query samples "
                "its own level only, however many feature maps there are"
            )
        super().__init__(num_levels=1, **kwargs)

    def predict_sampling(
        self, query: Tensor, reference_points: Tensor, spatial_shapes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predicts where each query samples its level and how it weighs the samples.

        Args:
            query: Tokens of all levels with their positional encoding added, shape (N, S, C).
            reference_points: Normalised to [0, 1] over the padded image, shape (N, S, L, 2) as
                (x, y), or (N, S, L, 4) as (x, y, w, h).
            spatial_shapes: (H, W) of each level, shape (L, 2).

        Returns:
            Sampling locations (x, y) normalised to [0, 1] over the level of the query, shape
            (N, S, M, 1, P, 2), and attention weights, shape (N, S, M, 1, P).

        Raises:
            ValueError: A shape does not fit, such as that of queries which are not the tokens of
                the levels (cross-attention).
        """
        sizes = self.level_sizes(spatial_shapes)
        tokens, levels = query.shape[1], len(sizes)
        if tokens != sum(sizes):
            raise ValueError(
                f"query: expected S = {sum(sizes)} tokens for spatial_shapes "
                f"{spatial_shapes.tolist()}, got {tokens}; {type(self).__name__} is for "
                "self-attention, where each query is a token of a level"
            )
        shape = tuple(getattr(reference_points, "shape", ()))
        # As in multi-scale attention one entry may stand for all.
        if len(shape) != 4 or shape[1] not in (1, tokens) or shape[2] not in (1, levels):
            raise ValueError(
                f"reference_points: expected shape (N, S, L, 2 or 4) = (N, {tokens}, {levels}, "
                f"2 or 4), got {shape or reference_points!r}"
            )
        points = reference_points.expand(-1, tokens, levels, -1)
        locations, weights = [], []
        for level, (level_query, level_points) in enumerate(
            zip(query.split(sizes, 1), points.split(sizes, 1), strict=True)
        ):
            own = slice(level, level + 1)
            level_locations, level_weights = super().predict_sampling(
                level_query, level_points[:, :, own], spatial_shapes[own]
            )
            locations.append(level_locations)
            weights.append(level_weights)
        return torch.cat(locations, 1), torch.cat(weights, 1)

    def _sample(
        self,
        value: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor | None,
        locations: Tensor,
        weights: Tensor,
    ) -> Tensor:
        sizes = self.level_sizes(spatial_shapes)
        by_level = (tensor.split(sizes, 1) for tensor in (value, locations, weights))
        outputs = [
            ms_deform_attn(level_value, shape[None], None, level_locations, level_weights)
            for shape, level_value, level_locations, level_weights in zip(
                spatial_shapes, *by_level, strict=True
            )
        ]
        return torch.cat(outputs, 1)

    @staticmethod
    def level_sizes(spatial_shapes: Tensor) -> list[int]:
        """Number of tokens of each level; ``spatial_shapes`` as in :meth:`predict_sampling`."""
        if not isinstance(spatial_shapes, Tensor) or spatial_shapes.shape[1:] != (2,):
            got = tuple(getattr(spatial_shapes, "shape", ())) or spatial_shapes
            raise ValueError(f"spatial_shapes: expected a tensor of shape (L, 2), got {got}")
        return [height * width for height, width in spatial_shapes.tolist()]

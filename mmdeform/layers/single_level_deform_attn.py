"""Deformable self-attention in which every query samples the feature map it belongs to.

The encoder of Deformable DETR without multi-scale attention: one side of the paper's ablation. The
authors released no code for it; this is the attention of one level (L = 1), applied to each level.

Source: Zhu et al., "Deformable DETR" (2021), https://arxiv.org/abs/2010.04159, table 2.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from mmdeform.registry import MODELS

from .ms_deform_attn import MultiScaleDeformableAttention

__all__ = ["SingleLevelDeformableAttention"]


@MODELS.register_module()
class SingleLevelDeformableAttention(MultiScaleDeformableAttention):
    """Self-attention over feature maps of several sizes that does not mix them.

    Takes the place of ``MultiScaleDeformableAttention`` in an encoder, where every token of every
    level is a query. A query of level l samples P points of level l, and its weights are softmaxed
    over these P. All levels share one set of parameters, as in multi-scale attention. With P = 1
    the one weight is always 1, and ``attention_weights`` learns nothing.

    State dict: the names of ``MultiScaleDeformableAttention`` and its shapes for L = 1, that is
    ``sampling_offsets`` (M*P*2, C), ``attention_weights`` (M*P, C), ``value_proj`` and
    ``output_proj``. Feature maps of any number and size can be given.

    The sizes of the maps are read on the host, so that each call waits for the device, and
    ``torch.compile`` breaks its graph here.

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

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        level_start_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attends to the level of each query.

        Args:
            query: Tokens of all levels, one level after the other, shape (S, N, C), or (N, S, C) if
                ``batch_first``.
            key: Unused; part of the interface of attention layers.
            value: Shape of ``query``. Default: ``query``.
            identity: Added to the output, shape of ``query``. Default: ``query``.
            query_pos: Positional encoding added to ``query``, but not to ``identity``.
            key_padding_mask: True where a token is padding and counts as zero, shape (N, S).
            reference_points: Normalised to [0, 1] over the padded image, shape (N, S, L, 2) as
                (x, y), or (N, S, L, 4) as (x, y, w, h); of a query the entry of its level is used.
            spatial_shapes: (H, W) of each level, int64, shape (L, 2).
            level_start_index: Unused: levels follow one another.
            **kwargs: Ignored; layers of mmdet pass more.

        Returns:
            Shape and layout of ``query``.

        Raises:
            ValueError: A shape does not fit, such as that of queries which are not the tokens of
                the levels (cross-attention); names the argument.
        """
        value = query if value is None else value
        identity = query if identity is None else identity
        axis = 1 if self.batch_first else 0  # of the tokens
        sizes = self._level_sizes(query.shape[axis], value.shape[axis], spatial_shapes)
        points = self._points_of_levels(reference_points, query.shape[axis], len(sizes))

        outputs = []
        start = 0
        for level, size in enumerate(sizes):
            tokens = functools.partial(_narrow, dim=axis, start=start, length=size)
            output = super().forward(
                query=tokens(query),
                value=tokens(value),
                identity=tokens(identity),
                query_pos=tokens(query_pos),
                key_padding_mask=tokens(key_padding_mask, dim=1),
                reference_points=tokens(points, dim=1)[:, :, level : level + 1],
                spatial_shapes=spatial_shapes[level : level + 1],
            )
            outputs.append(output)
            start += size
        return torch.cat(outputs, axis)

    def _level_sizes(self, queries: int, tokens: int, spatial_shapes: Tensor | None) -> list[int]:
        if not isinstance(spatial_shapes, Tensor) or spatial_shapes.shape[1:] != (2,):
            got = getattr(spatial_shapes, "shape", spatial_shapes)
            raise ValueError(f"spatial_shapes: expected a tensor of shape (L, 2), got {got}")
        shapes = spatial_shapes.tolist()
        sizes = [height * width for height, width in shapes]
        for name, got in (("query", queries), ("value", tokens)):
            if got != sum(sizes):
                raise ValueError(
                    f"{name}: expected S = {sum(sizes)} tokens for spatial_shapes {shapes}, got "
                    f"{got}; {type(self).__name__} is for self-attention, where each query is a "
                    "token of a level"
                )
        return sizes

    @staticmethod
    def _points_of_levels(reference_points: Tensor | None, tokens: int, levels: int) -> Tensor:
        # As in multi-scale attention one entry may stand for all. The other dimensions are checked
        # level by level.
        shape = getattr(reference_points, "shape", ())
        if len(shape) != 4 or shape[1] not in (1, tokens) or shape[2] not in (1, levels):
            raise ValueError(
                f"reference_points: expected shape (N, S, L, 2 or 4) = (N, {tokens}, {levels}, "
                f"2 or 4), got {tuple(shape) or reference_points!r}"
            )
        return reference_points.expand(-1, tokens, levels, -1)


def _narrow(tensor: Tensor | None, dim: int, start: int, length: int) -> Tensor | None:
    return None if tensor is None else tensor.narrow(dim, start, length)

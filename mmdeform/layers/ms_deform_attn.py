"""Multi-scale deformable attention, in place of mmcv's layer.

Derives from mmcv's class, which detectors look for to initialise it, and has its arguments,
parameters, initial values and state dict. The operator is ``mmdeform.ops.ms_deform_attn``.

Source: Zhu et al., "Deformable DETR" (2021), https://arxiv.org/abs/2010.04159.
"""

import functools
import warnings
from typing import Any

import torch
from mmcv.ops import multi_scale_deform_attn as mmcv_msda
from mmengine.utils import deprecated_api_warning
from torch import Tensor

from mmdeform.ops import ms_deform_attn
from mmdeform.registry import MODELS

from .offset_limit import OffsetLimit

__all__ = ["MultiScaleDeformableAttention"]


@functools.cache  # a detector builds a dozen of these layers: tell once
def _warn_head_channels(channels: int) -> None:
    warnings.warn(
        f"MultiScaleDeformableAttention: {channels} channels per head are not a multiple of 8; the "
        "kernels are right but slower, because they read 16 bytes at a time",
        stacklevel=3,
    )


@MODELS.register_module()
class MultiScaleDeformableAttention(OffsetLimit, mmcv_msda.MultiScaleDeformableAttention):
    """Attention that reads each query's few sampling points from feature maps of several sizes.

    Dimensions: N batch, Lq queries, S tokens of all levels, C ``embed_dims``, M heads, L levels,
    P points. Any number of heads, levels and points works.

    Args:
        embed_dims: Channels of query and output, C. Default: 256.
        num_heads: Heads M; divides the channels of the value projection. Default: 8.
        num_levels: Feature maps L. Default: 4.
        num_points: Sampling points P per head and level. Default: 4.
        im2col_step: Accepted for configs written for mmcv; without effect.
        dropout: Dropout rate of the output before the identity is added. Default: 0.1.
        batch_first: If True tensors are (N, Lq, C), otherwise (Lq, N, C). Default: False.
        norm_cfg: Kept as an attribute; without effect, as in mmcv.
        init_cfg: mmengine's initialisation config.
        value_proj_ratio: Channels of the value projection as a multiple of C. Default: 1.0.
        offset_range: Limits what ``sampling_offsets`` predicts smoothly: r * tanh(offset / r). It
            counts pixels of a level around reference points, and 1/(2P) of the box's size around
            reference boxes. At first the points of a head lie 1 to P steps away: at least P, which
            draws the outermost in to 0.76 P. Default: none.
        offset_clamp: Limits it sharply, in the same unit; at least P. Default: none.

    Raises:
        ValueError: Channels are not divisible by the heads, or limits do not fit.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        im2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
        norm_cfg: dict | None = None,
        init_cfg: Any = None,
        value_proj_ratio: float = 1.0,
        offset_range: float | None = None,
        offset_clamp: float | None = None,
    ) -> None:
        value_channels = int(embed_dims * value_proj_ratio)
        for name, channels in (
            ("embed_dims", embed_dims),
            ("embed_dims * value_proj_ratio", value_channels),
        ):
            if num_heads < 1 or channels % num_heads:
                raise ValueError(
                    f"{type(self).__name__}: {name} must be divisible by num_heads, "
                    f"got {channels} and num_heads={num_heads}"
                )
        if (value_channels // num_heads) % 8:
            _warn_head_channels(value_channels // num_heads)
        with warnings.catch_warnings():
            # mmcv asks for a power of two, which matters to its own kernels only.
            warnings.filterwarnings("ignore", message="You'd better set embed_dims")
            super().__init__(
                embed_dims,
                num_heads,
                num_levels,
                num_points,
                im2col_step,
                dropout,
                batch_first,
                norm_cfg,
                init_cfg,
                value_proj_ratio,
            )
        self._set_offset_limit(offset_range, offset_clamp)
        for name in ("offset_range", "offset_clamp"):
            limit = getattr(self, name)
            if limit is not None and limit < num_points:
                raise ValueError(
                    f"{type(self).__name__}: {name} must be at least num_points={num_points}, "
                    f"which the offsets reach at first, got {limit}"
                )

    def extra_repr(self) -> str:
        parts = (
            f"embed_dims={self.embed_dims}, num_heads={self.num_heads}, "
            f"num_levels={self.num_levels}, num_points={self.num_points}, "
            f"batch_first={self.batch_first}",
            super().extra_repr(),
        )
        return ", ".join(filter(None, parts))

    def predict_sampling(
        self, query: Tensor, reference_points: Tensor, spatial_shapes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predicts where each query samples and how it weighs the samples.

        Both are computed in fp32 (fp64 for an fp64 query), also under autocast: in bf16 a location
        on a map 200 pixels wide would be off by up to 0.4 pixels.

        Args:
            query: Queries with their positional encoding added, shape (N, Lq, C).
            reference_points: Normalised to [0, 1] over the padded image, shape (N, Lq, L, 2) as
                (x, y), or (N, Lq, L, 4) as (x, y, w, h).
            spatial_shapes: (H, W) of each level, shape (L, 2).

        Returns:
            Sampling locations (x, y) normalised to [0, 1], shape (N, Lq, M, L, P, 2), and attention
            weights, softmaxed over all L * P samples of a head, shape (N, Lq, M, L, P).

        Raises:
            ValueError: ``reference_points`` or ``spatial_shapes`` has another shape.
        """
        self._check_reference_points(query, reference_points, spatial_shapes)
        batch, queries, _ = query.shape
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        shape = (batch, queries, self.num_heads, self.num_levels, self.num_points)
        offsets = self._limit_offset(self.sampling_offsets(query).view(*shape, 2).to(dtype))
        weights = self.attention_weights(query).view(*shape[:3], -1).softmax(-1, dtype=dtype)
        points = reference_points[:, :, None, :, None].to(dtype)  # (N, Lq, 1, L, 1, 2 or 4)
        if reference_points.shape[-1] == 2:
            sizes = spatial_shapes.flip(-1).to(dtype)  # (W, H): offsets are in pixels of the level
            locations = points + offsets / sizes[:, None]
        else:
            # The points of a head that start P steps apart fill half the box.
            locations = points[..., :2] + offsets / self.num_points * points[..., 2:] * 0.5
        return locations, weights.view(shape)

    def _check_reference_points(
        self, query: Tensor, reference_points: Tensor, spatial_shapes: Tensor
    ) -> None:
        for name, tensor in (
            ("reference_points", reference_points),
            ("spatial_shapes", spatial_shapes),
        ):
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{name}: expected a tensor, got {tensor!r}")
        if tuple(spatial_shapes.shape) != (self.num_levels, 2):
            raise ValueError(
                f"spatial_shapes: expected shape (L, 2) = ({self.num_levels}, 2), "
                f"got {tuple(spatial_shapes.shape)}"
            )
        # As in mmcv one batch entry or level may stand for all.
        expected = (query.shape[0], query.shape[1], self.num_levels)
        got = tuple(reference_points.shape)
        if (
            len(got) != 4
            or got[3] not in (2, 4)
            or any(size not in (1, wanted) for size, wanted in zip(got, expected, strict=False))
        ):
            raise ValueError(
                f"reference_points: expected shape (N, Lq, L, 2 or 4) = {(*expected, '2 or 4')}, "
                f"got {got}"
            )

    @deprecated_api_warning({"residual": "identity"}, cls_name="MultiScaleDeformableAttention")
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
        """Attends to ``value`` at the sampling points of each query.

        Args:
            query: Shape (Lq, N, C), or (N, Lq, C) if ``batch_first``.
            key: Unused; part of the interface of attention layers.
            value: Tokens of all levels, shape (S, N, C) or (N, S, C). Default: ``query``.
            identity: Added to the output, shape of ``query``. Default: ``query``.
            query_pos: Positional encoding added to ``query``, but not to ``identity``.
            key_padding_mask: True where a token is padding and counts as zero, shape (N, S).
            reference_points: Normalised to [0, 1] over the padded image, shape (N, Lq, L, 2) as
                (x, y), or (N, Lq, L, 4) as (x, y, w, h).
            spatial_shapes: (H, W) of each level, int64, shape (L, 2).
            level_start_index: First token of each level, int64, shape (L,). Default: levels follow
                one another.
            **kwargs: Ignored; layers of mmdet pass more.

        Returns:
            Shape and layout of ``query``.

        Raises:
            ValueError: A shape does not fit; names the argument.
        """
        value = query if value is None else value
        identity = query if identity is None else identity
        if query_pos is not None:
            query = query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        locations, weights = self.predict_sampling(query, reference_points, spatial_shapes)
        self._check_tokens(value, spatial_shapes)

        value = self.value_proj(value)
        if key_padding_mask is not None:
            value = value.masked_fill(key_padding_mask[..., None], 0.0)
        value = value.unflatten(-1, (self.num_heads, -1))
        output = self._sample(value, spatial_shapes, level_start_index, locations, weights)
        output = self.output_proj(output)
        if not self.batch_first:
            output = output.transpose(0, 1)
        return self.dropout(output) + identity

    def _sample(
        self,
        value: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor | None,
        locations: Tensor,
        weights: Tensor,
    ) -> Tensor:
        return ms_deform_attn(value, spatial_shapes, level_start_index, locations, weights)

    @staticmethod
    def _check_tokens(value: Tensor, spatial_shapes: Tensor) -> None:
        # Only where reading the shapes is free: on an accelerator it would wait for the device.
        if spatial_shapes.device.type != "cpu" or torch.compiler.is_compiling():
            return
        tokens = int(spatial_shapes.prod(1).sum())
        if value.shape[1] != tokens:
            raise ValueError(
                f"value: expected S = {tokens} tokens for spatial_shapes "
                f"{spatial_shapes.tolist()}, got {value.shape[1]}"
            )

"""Deformable attention of DAT and DAT++: all queries attend to keys at predicted points of the map.

The operators are ``mmdeform.ops.dat_sample`` and ``mmdeform.ops.dat_attn``.

Source: Xia et al., "Vision Transformer with Deformable Attention" (2022),
https://arxiv.org/abs/2201.00520; "DAT++" (2023), https://arxiv.org/abs/2309.01430.
"""

import math
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional

from mmdeform.ops import dat_attn, dat_sample
from mmdeform.ops._arguments import pair
from mmdeform.ops.dat_attn import BACKENDS
from mmdeform.registry import MODELS

from .layer_norm import LayerNorm2d
from .position_bias import fixed_bias, log_cpb_bias, relative_bias

__all__ = ["DeformableAttention2d"]

IntPair = int | tuple[int, int]
_VERSIONS = ("v1", "pp")
_BIASES = ("relative", "depthwise", "fixed", "log_cpb", None)


@MODELS.register_module()
class DeformableAttention2d(BaseModule):
    """Self-attention of a map to keys that it samples from itself, at points that it predicts.

    Keys start from a regular grid, every ``stride`` pixels; a small network moves them, each group
    of channels by its own offsets. Every query attends to all of them, with a bias for the
    displacement between query and key. Input and output are (B, C, H, W) of any size; parameters
    have the names and initial values of the public module, whose checkpoints fit.

    The two versions differ in coordinates: ``v1`` normalises by the size of the map, ``pp`` (DAT++,
    and all published detectors) by the size less one, so that its grid of keys runs past the right
    and lower border; and in what a range factor means. Where the public code fails this layer does
    not: maps with one row or column of keys, which then lie in the middle; 'v1' at any size;
    position biases without offsets.

    ``backend`` says how attention is computed. 'auto': with the fused operator for 'relative'; with
    ``scaled_dot_product_attention`` of torch for 'depthwise' and None; these need no memory of the
    size of queries times keys. Attention is written out, with all logits in memory, for 'fixed' and
    'log_cpb', and for 'relative' while ``attn_drop`` drops. 'fused': the same, but an error where
    attention would be written out or a kernel is missing. 'reference': always written out.

    Args:
        embed_dims: Channels C of input and output.
        num_heads: Attention heads M; divides C.
        num_groups: Groups G with offsets of their own; divides M. Default: 1.
        feat_size: Size of the map, one number or (H, W), for which the tables of 'relative' and
            'fixed' are made. At other sizes they are stretched. Default: 14.
        stride: Pixels between keys, one number or (vertical, horizontal). Default: 1.
        kernel_size: Kernel of the network that predicts offsets. Default: 5.
        offset_range_factor: s, how far keys may move. Positive: s / 2 * tanh(offset) steps between
            keys. Zero: in 'v1' any distance, predicted in normalised units, in 'pp' none at all.
            Negative: any distance, in normalised units, but not out of the map: 'v1' squashes
            positions with tanh, 'pp' clamps them. Default: 2.0.
        version: Coordinates of 'v1' or 'pp'. Default: 'pp'.
        position_bias: 'relative': table of displacements, (M, 2H - 1, 2W - 1), interpolated.
            'depthwise': a 3 x 3 depthwise convolution of the queries, added to the output.
            'fixed': table of query and key. 'log_cpb': small network of displacements. None.
            Default: 'relative'.
        use_offsets: False leaves keys where they are, as averages of ``stride`` x ``stride``
            pixels; sizes have to be divisible by the stride, and ``conv_offset`` is frozen.
            Default: True.
        attn_drop: Dropout rate of attention weights. Default: 0.0.
        proj_drop: Dropout rate of the output. Default: 0.0.
        backend: 'auto', 'fused' or 'reference'; see above. Default: 'auto'.
        init_cfg: mmengine's initialisation config.

    Raises:
        ValueError: Arguments are unknown or contradict each other.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        num_groups: int = 1,
        feat_size: IntPair = 14,
        stride: IntPair = 1,
        kernel_size: IntPair = 5,
        offset_range_factor: float = 2.0,
        version: str = "pp",
        position_bias: str | None = "relative",
        use_offsets: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str = "auto",
        init_cfg: Any = None,
    ) -> None:
        super().__init__(init_cfg)
        for name, number, divisor_name, divisor in (
            ("embed_dims", embed_dims, "num_heads", num_heads),
            ("num_heads", num_heads, "num_groups", num_groups),
        ):
            if number < 1 or divisor < 1 or number % divisor:
                raise ValueError(
                    f"DeformableAttention2d: {name} must be divisible by {divisor_name}, "
                    f"got {name}={number}, {divisor_name}={divisor}"
                )
        for name, value, known in (
            ("version", version, _VERSIONS),
            ("position_bias", position_bias, _BIASES),
            ("backend", backend, BACKENDS),
        ):
            if value not in known:
                raise ValueError(
                    f"DeformableAttention2d: {name} must be one of {known}, got {value!r}"
                )
        if backend == "fused" and position_bias in ("fixed", "log_cpb"):
            raise ValueError(
                f"DeformableAttention2d: backend='fused' knows position_bias 'relative', "
                f"'depthwise' and None, got {position_bias!r}; use backend='auto'"
            )
        if not math.isfinite(offset_range_factor):
            raise ValueError(
                "DeformableAttention2d: offset_range_factor must be a finite number, "
                f"got {offset_range_factor}"
            )
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.num_groups = num_groups
        self.feat_size = tuple(pair(feat_size, "feat_size", 1))
        self.stride = tuple(pair(stride, "stride", 1))
        self.kernel_size = tuple(pair(kernel_size, "kernel_size", 1))
        self.offset_range_factor = offset_range_factor
        self.version = version
        self.position_bias = position_bias
        self.use_offsets = use_offsets
        self.backend = backend
        self.scale = (embed_dims // num_heads) ** -0.5

        channels = embed_dims // num_groups
        # The public code of DAT++ pads nothing where the windows do not overlap.
        padding = [
            0 if version == "pp" and kernel == step else kernel // 2
            for kernel, step in zip(self.kernel_size, self.stride, strict=True)
        ]
        self.conv_offset = nn.Sequential(
            nn.Conv2d(channels, channels, self.kernel_size, self.stride, padding, groups=channels),
            LayerNorm2d(channels),
            nn.GELU(),
            nn.Conv2d(channels, 2, 1, bias=False),  # y, x
        )
        self.conv_offset.requires_grad_(use_offsets)
        self.proj_q = nn.Conv2d(embed_dims, embed_dims, 1)
        self.proj_k = nn.Conv2d(embed_dims, embed_dims, 1)
        self.proj_v = nn.Conv2d(embed_dims, embed_dims, 1)
        self.proj_out = nn.Conv2d(embed_dims, embed_dims, 1)
        self.proj_drop = nn.Dropout(proj_drop)
        self.attn_drop = nn.Dropout(attn_drop)
        self.rpe_table = self._make_bias()

    def _make_bias(self) -> nn.Module | nn.Parameter | None:
        """The parameters of the position bias, under the one name that the public code has."""
        height, width = self.feat_size
        if self.position_bias is None:
            return None
        if self.position_bias == "depthwise":
            return nn.Conv2d(self.embed_dims, self.embed_dims, 3, padding=1, groups=self.embed_dims)
        if self.position_bias == "log_cpb":
            return nn.Sequential(
                nn.Linear(2, 32),
                nn.ReLU(),
                nn.Linear(32, self.num_heads // self.num_groups, bias=False),
            )
        if self.position_bias == "relative":
            table = torch.empty(self.num_heads, 2 * height - 1, 2 * width - 1)
        else:
            key_height, key_width = self._key_size(height, width)
            table = torch.empty(self.num_heads, height * width, key_height * key_width)
        return nn.Parameter(nn.init.trunc_normal_(table, std=0.01))

    def forward(self, x: Tensor) -> Tensor:
        """Lets every pixel attend to the deformed keys.

        Args:
            x: Shape (B, C, H, W).

        Returns:
            Shape (B, C, H, W).

        Raises:
            ValueError: The shape does not fit the layer.
            RuntimeError: ``backend='fused'`` cannot drop attention weights.
        """
        query, key, value, positions = self._project(x)
        output = self._attend(query, key, value, positions).flatten(1, 2)
        if self.position_bias == "depthwise":
            output = output + self.rpe_table(query.flatten(1, 2))
        return self.proj_drop(self.proj_out(output))

    def predict_positions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts where the layer samples its keys.

        Both results are computed in fp32 (fp64 for an fp64 ``x``).

        Args:
            x: Input of the layer, shape (B, C, H, W).

        Returns:
            Positions and the reference points from which they are offset, each of shape
            (B, G, Hk, Wk, 2), as (y, x), where -1 and 1 are the centres of the first and the last
            pixel. Without offsets positions are the reference points, within the limits of a
            negative ``offset_range_factor``.

        Raises:
            ValueError: The shape does not fit the layer.
        """
        self._check_input(x)
        return self._move_keys(self.proj_q(x), _coordinate_dtype(x))

    def attention(self, x: Tensor, queries: Tensor) -> Tensor:
        """Tells how much some of the queries attend to each key.

        Args:
            x: Input of the layer, shape (B, C, H, W).
            queries: Pixels, y * W + x, int64, shape (K,).

        Returns:
            Attention weights, which sum to 1 over the keys, shape (B, M, K, Ns), in fp32 (fp64 for
            an fp64 ``x``). Keys are in the order of :meth:`predict_positions`, Ns = Hk * Wk.

        Raises:
            ValueError: ``x`` does not fit the layer, or ``queries`` the map.
        """
        query, key, _, positions = self._project(x)
        pixels = query.shape[3] * query.shape[4]
        if queries.dim() != 1 or queries.dtype != torch.int64:
            raise ValueError(
                f"queries: expected int64 of shape (K,), got {queries.dtype} of shape "
                f"{tuple(queries.shape)}"
            )
        if queries.numel() and not 0 <= int(queries.min()) <= int(queries.max()) < pixels:
            raise ValueError(
                f"queries: expected pixels from 0 to {pixels - 1}, got {int(queries.min())} to "
                f"{int(queries.max())}"
            )
        return self._weights(query, key, positions, queries)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query (B, M, Dh, H, W), key and value (B, M, Dh, Ns), positions (B, G, Ns, 2)."""
        self._check_input(x)
        query = self.proj_q(x)
        positions = self._move_keys(query, _coordinate_dtype(x))[0].flatten(2, 3)
        if self.use_offsets:
            sampled = dat_sample(x, positions, backend=self.backend)
        else:
            sampled = functional.avg_pool2d(x, self.stride, self.stride).flatten(2)
        sampled = sampled[:, :, None]
        query, key, value = (
            tensor.unflatten(1, (self.num_heads, -1))
            for tensor in (query, self.proj_k(sampled), self.proj_v(sampled))
        )
        return query, key.flatten(3), value.flatten(3), positions

    def _move_keys(self, query: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """:meth:`predict_positions` from what ``proj_q`` returns."""
        size = self._key_size(query.shape[2], query.shape[3])
        reference = _grid(size, 0.5, self.version == "pp", query.device, dtype)
        reference = reference.expand(query.shape[0], self.num_groups, -1, -1, -1)
        if not self.use_offsets:
            return self._limit(reference), reference
        groups = query.unflatten(1, (self.num_groups, -1)).flatten(0, 1)
        offset = self.conv_offset(groups).to(dtype)  # (B * G, 2, Hk, Wk)
        offset = offset.unflatten(0, (query.shape[0], self.num_groups)).movedim(2, -1)
        factor = self.offset_range_factor
        if factor > 0 or (factor == 0 and self.version == "pp"):
            # DAT++ counts intervals between the first and the last key, of which one key has none.
            steps = [max(n - 1, 1) if self.version == "pp" else n for n in size]
            offset = offset.tanh() * offset.new_tensor([factor / n for n in steps])
        return self._limit(reference + offset), reference

    def _limit(self, positions: Tensor) -> Tensor:
        """Keeps positions in the map if the range factor is negative."""
        if self.offset_range_factor >= 0:
            return positions
        return positions.clamp(-1, 1) if self.version == "pp" else positions.tanh()

    def _key_size(self, height: int, width: int) -> tuple[int, int]:
        """(Hk, Wk) of a map."""
        if not self.use_offsets:
            if height % self.stride[0] or width % self.stride[1]:
                raise ValueError(
                    "DeformableAttention2d: without offsets the size of a map must be divisible by "
                    f"the stride {self.stride}, got {height} x {width}"
                )
            return height // self.stride[0], width // self.stride[1]
        conv = self.conv_offset[0]
        rows, columns = (
            (n + 2 * padding - kernel) // step + 1
            for n, padding, kernel, step in zip(
                (height, width), conv.padding, conv.kernel_size, conv.stride, strict=True
            )
        )
        if rows < 1 or columns < 1:
            raise ValueError(
                f"DeformableAttention2d: a map of {height} x {width} pixels is smaller than the "
                f"kernel {self.kernel_size} of the offsets with padding {conv.padding}"
            )
        return rows, columns

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        """Attention, shape (B, M, Dh, H, W), by the backend that fits."""
        drop = self.attn_drop.p if self.training else 0.0
        if self.backend == "fused" and drop:
            raise RuntimeError(
                f"DeformableAttention2d: backend='fused' has no dropout of attention weights, got "
                f"attn_drop={self.attn_drop.p} in training; use backend='auto'"
            )
        if self.backend != "reference":
            if self.position_bias == "relative" and not drop:
                return dat_attn(
                    query,
                    key,
                    value,
                    positions,
                    self.rpe_table,
                    scale=self.scale,
                    align_corners=self.version == "pp",
                    backend=self.backend,
                )
            if self.position_bias in ("depthwise", None):
                rows = [t.flatten(3).transpose(2, 3).contiguous() for t in (query, key, value)]
                output = functional.scaled_dot_product_attention(*rows, dropout_p=drop)
                return output.transpose(2, 3).view_as(query)
        weights = self.attn_drop(self._weights(query, key, positions)).to(value.dtype)
        return torch.matmul(value, weights.transpose(2, 3)).view_as(query)

    def _weights(
        self, query: Tensor, key: Tensor, positions: Tensor, queries: Tensor | None = None
    ) -> Tensor:
        """Softmaxed weights of all or some queries, shape (B, M, K, Ns), dtype of positions."""
        height, width = query.shape[3:]
        aligned = self.version == "pp"
        points = _grid(
            (height, width), 0.0 if aligned else 0.5, aligned, positions.device, positions.dtype
        ).flatten(0, 1)
        query = query.flatten(3)
        if queries is not None:
            query, points = query[..., queries], points[queries]
        logits = torch.matmul(query.transpose(2, 3) * self.scale, key).to(positions.dtype)
        if self.position_bias == "relative":
            logits = logits + relative_bias(self.rpe_table, points, positions)
        elif self.position_bias == "log_cpb":
            logits = logits + log_cpb_bias(self.rpe_table, points, positions)
        elif self.position_bias == "fixed":
            bias = fixed_bias(self.rpe_table, height * width, positions.shape[2])
            logits = logits + (bias if queries is None else bias[:, :, queries])
        return logits.softmax(-1)

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.embed_dims or 0 in x.shape[2:]:
            raise ValueError(
                f"x: expected shape (B, C, H, W) with C = {self.embed_dims}, got {tuple(x.shape)}"
            )

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dims}, num_heads={self.num_heads}, num_groups={self.num_groups}, "
            f"stride={self.stride}, kernel_size={self.kernel_size}, "
            f"offset_range_factor={self.offset_range_factor}, version={self.version!r}, "
            f"position_bias={self.position_bias!r}, use_offsets={self.use_offsets}, "
            f"backend={self.backend!r}"
        )


def _coordinate_dtype(x: Tensor) -> torch.dtype:
    """In half precision a position on a map 200 pixels wide would be off by up to 0.4 pixels."""
    return torch.promote_types(x.dtype, torch.float32)


def _grid(
    size: tuple[int, int], shift: float, aligned: bool, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Positions (y, x) of the cells of a grid, normalised to [-1, 1], shape (rows, columns, 2).

    Args:
        size: (rows, columns).
        shift: Added to the index of a cell.
        aligned: Divides by the number of cells less one, where there is more than one, and not by
            their number.
        device: Of the result.
        dtype: Of the result.
    """
    axes = []
    for cells in size:
        index = torch.arange(cells, device=device, dtype=dtype)
        extent = cells - 1 if aligned else cells
        # The only cell of an axis lies in the middle.
        axes.append((index + shift) / extent * 2 - 1 if extent else index)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)

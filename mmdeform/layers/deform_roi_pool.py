"""Deformable RoI pooling layers, v1 and modulated, in place of mmcv's.

Each class derives from the mmcv class of the same name and has its arguments; with ``head='mmcv'``,
the default, also its parameters and state dict. The operator is ``mmdeform.ops.deform_roi_pool``.
What mmcv's layers refuse works here: the CPU, bf16, and no RoIs at all.

Source: Dai et al., "Deformable Convolutional Networks" (2017); Zhu et al., "Deformable ConvNets v2"
(2018).
"""

import importlib
import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from mmdeform.ops import deform_roi_pool
from mmdeform.registry import MODELS

from .offset_layers import OffsetLinear
from .offset_limit import OffsetLimit

__all__ = ["DeformRoIPool", "DeformRoIPoolPack", "ModulatedDeformRoIPoolPack"]

# mmcv.ops.deform_roi_pool is the function of this name, which hides its module.
_mmcv = importlib.import_module("mmcv.ops.deform_roi_pool")


@MODELS.register_module()
class DeformRoIPool(_mmcv.DeformRoIPool):
    """Deformable RoI pooling that takes the offsets, and for v2 the mask, as inputs.

    Without both it is RoIAlign with ``aligned=True``.

    Args:
        output_size: Bins per RoI (Ph, Pw).
        spatial_scale: Size of the feature map relative to the image: 1 / stride. Default: 1.0.
        sampling_ratio: Samples per bin and axis; 0 takes about one per pixel. Default: 0.
        gamma: Offset of 1, as a fraction of the RoI's width or height. Default: 0.1.
    """

    def forward(
        self,
        input: Tensor,
        rois: Tensor,
        offset: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Pools every RoI into bins that the offsets move.

        Args:
            input: Feature map, shape (N, C, H, W).
            rois: (image index, x1, y1, x2, y2) in pixels of the image, shape (R, 5). Better fp32
                than fp16, which is off by up to half a pixel beyond 1024.
            offset: (x, y) of each bin in ``gamma`` times the RoI's size, shape (R, 2, Ph, Pw).
                Default: zero.
            mask: Weight of each bin, shape (R, Ph, Pw). Default: 1.

        Returns:
            Shape (R, C, Ph, Pw).

        Raises:
            ValueError: A shape does not fit.
        """
        return deform_roi_pool(
            input,
            rois,
            offset,
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.gamma,
            mask,
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, gamma={self.gamma}"
        )


class _PackMixin:
    """What the layers that predict their offsets share.

    mmcv's constructors are passed over: they would build mmcv's head, whatever ``head`` is.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        output_channels: int,
        deform_fc_channels: int = 1024,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
        head: str = "mmcv",
        offset_range: float | None = None,
        offset_clamp: float | None = None,
    ) -> None:
        if head not in ("mmcv", "paper"):
            raise ValueError(f"{type(self).__name__}: head must be 'mmcv' or 'paper', got {head!r}")
        _mmcv.DeformRoIPool.__init__(self, output_size, spatial_scale, sampling_ratio, gamma)
        self.output_channels = output_channels
        self.deform_fc_channels = deform_fc_channels
        self.head = head
        self._set_offset_limit(offset_range, offset_clamp)
        self._build_head()

    @property
    def _bins(self) -> int:
        return self.output_size[0] * self.output_size[1]

    def _hidden_layers(self, count: int) -> list[nn.Module]:
        """Fully connected layers, each followed by ReLU, from the pooled features on."""
        sizes = [self._bins * self.output_channels] + [self.deform_fc_channels] * count
        layers: list[nn.Module] = []
        for size, next_size in itertools.pairwise(sizes):
            layers += [nn.Linear(size, next_size), nn.ReLU(inplace=True)]
        return layers

    def _pool_plainly(self, input: Tensor, rois: Tensor) -> Tensor:
        """Features from which offsets are predicted, shape (R, C * Ph * Pw)."""
        if input.dim() != 4 or input.shape[1] != self.output_channels:
            raise ValueError(
                f"{type(self).__name__}: input must have shape (N, {self.output_channels}, H, W), "
                f"got {tuple(input.shape)}"
            )
        return DeformRoIPool.forward(self, input, rois).flatten(1)

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pools every RoI into bins whose places follow from its content.

        Args:
            input: Feature map, shape (N, C, H, W).
            rois: (image index, x1, y1, x2, y2) in pixels of the image, shape (R, 5).

        Returns:
            Shape (R, C, Ph, Pw). Without RoIs it is empty, and every parameter still gets a
            gradient, of zero, as training on several devices demands.

        Raises:
            ValueError: A shape does not fit.
        """
        return DeformRoIPool.forward(self, input, rois, *self.predict_offset(input, rois))

    def extra_repr(self) -> str:
        return (
            f"{DeformRoIPool.extra_repr(self)}, output_channels={self.output_channels}, "
            f"head={self.head!r}"
        )


@MODELS.register_module()
class DeformRoIPoolPack(OffsetLimit, _PackMixin, DeformRoIPool, _mmcv.DeformRoIPoolPack):
    """Deformable RoI pooling (v1) that predicts its offsets from the plainly pooled RoI.

    The offsets start as zero: at first the layer is RoIAlign. All layers that predict them are
    named ``offset_fc``, so that a config reaches their learning rate; the paper multiplies that of
    its single one by 0.01: ``paramwise_cfg=dict(offset=dict(roi=dict(lr_mult=0.01)))`` of
    ``mmdeform.OffsetLrConstructor``.

    Args:
        output_size: Bins per RoI (Ph, Pw).
        output_channels: Channels of the feature map, C.
        deform_fc_channels: Channels of the hidden layers; without effect on the paper's head, which
            has none. Default: 1024.
        spatial_scale: Size of the feature map relative to the image: 1 / stride. Default: 1.0.
        sampling_ratio: Samples per bin and axis; 0 takes about one per pixel. Default: 0.
        gamma: Offset of 1, as a fraction of the RoI's width or height. Default: 0.1.
        head: 'mmcv': mmcv's three fully connected layers; 'paper': the one of the paper. Default:
            'mmcv'.
        offset_range: Limits offsets smoothly to this many times ``gamma`` of the RoI's size:
            r * tanh(offset / r). Default: none.
        offset_clamp: Limits them sharply, in the same unit. Default: none.

    Raises:
        ValueError: Unknown ``head``, or limits contradict each other.
    """

    def _build_head(self) -> None:
        pooled, offsets = self._bins * self.output_channels, 2 * self._bins
        if self.head == "mmcv":
            self.offset_fc = nn.Sequential(
                *self._hidden_layers(2), OffsetLinear(self.deform_fc_channels, offsets)
            )
        else:
            self.offset_fc = OffsetLinear(pooled, offsets)

    def predict_offset(self, input: Tensor, rois: Tensor) -> tuple[Tensor, None]:
        """Predicts where the bins go.

        Args:
            input: Feature map, shape (N, C, H, W).
            rois: (image index, x1, y1, x2, y2) in pixels of the image, shape (R, 5).

        Returns:
            Offsets (x, y) in ``gamma`` times the RoI's size, shape (R, 2, Ph, Pw); and None, for v1
            has no mask.
        """
        offset = self.offset_fc(self._pool_plainly(input, rois))
        return self._limit_offset(offset).view(-1, 2, *self.output_size), None


@MODELS.register_module()
class ModulatedDeformRoIPoolPack(
    OffsetLimit, _PackMixin, DeformRoIPool, _mmcv.ModulatedDeformRoIPoolPack
):
    """Modulated deformable RoI pooling (v2): predicts offsets and a mask from the pooled RoI.

    Offsets start as zero and the mask as 0.5: at first the layer is half of RoIAlign. mmcv's head
    predicts the mask by a branch of its own, ``mask_fc``; the paper's is one branch, ``offset_fc``,
    of two hidden layers and one layer for offsets and mask. The paper trains it at the normal
    learning rate.

    Args:
        output_size: Bins per RoI (Ph, Pw).
        output_channels: Channels of the feature map, C.
        deform_fc_channels: Channels of the hidden layers. Default: 1024.
        spatial_scale: Size of the feature map relative to the image: 1 / stride. Default: 1.0.
        sampling_ratio: Samples per bin and axis; 0 takes about one per pixel. Default: 0.
        gamma: Offset of 1, as a fraction of the RoI's width or height. Default: 0.1, the first
            paper's and mmcv's.
        head: 'mmcv' or 'paper'. Default: 'mmcv'.
        offset_range: Limits offsets smoothly to this many times ``gamma`` of the RoI's size:
            r * tanh(offset / r). Default: none.
        offset_clamp: Limits them sharply, in the same unit. Default: none.

    Raises:
        ValueError: Unknown ``head``, or limits contradict each other.
    """

    def _build_head(self) -> None:
        hidden = self.deform_fc_channels
        if self.head == "mmcv":
            self.offset_fc = nn.Sequential(
                *self._hidden_layers(2), OffsetLinear(hidden, 2 * self._bins)
            )
            self.mask_fc = nn.Sequential(
                *self._hidden_layers(1), OffsetLinear(hidden, self._bins), nn.Sigmoid()
            )
        else:
            self.offset_fc = nn.Sequential(
                *self._hidden_layers(2), OffsetLinear(hidden, 3 * self._bins)
            )
            for layer in (self.offset_fc[0], self.offset_fc[2]):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)

    def predict_offset(self, input: Tensor, rois: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts where the bins go and how they are weighed.

        Args:
            input: Feature map, shape (N, C, H, W).
            rois: (image index, x1, y1, x2, y2) in pixels of the image, shape (R, 5).

        Returns:
            Offsets (x, y) in ``gamma`` times the RoI's size, shape (R, 2, Ph, Pw), and mask in
            (0, 1), shape (R, Ph, Pw).
        """
        pooled = self._pool_plainly(input, rois)
        if self.head == "mmcv":
            offset, mask = self.offset_fc(pooled), self.mask_fc(pooled)
        else:
            offset, mask = self.offset_fc(pooled).split([2 * self._bins, self._bins], dim=1)
            mask = mask.sigmoid()
        offset = self._limit_offset(offset).reshape(-1, 2, *self.output_size)
        return offset, mask.reshape(-1, *self.output_size)

"""Deformable position-sensitive RoI pooling, the head of R-FCN.

The operator is ``mmdeform.ops.deform_ps_roi_pool``.

Source: Dai et al., "R-FCN: Object Detection via Region-based Fully Convolutional Networks" (2016);
Dai et al., "Deformable Convolutional Networks" (2017).
"""

from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from mmdeform.ops import deform_ps_roi_pool
from mmdeform.registry import MODELS

from .offset_layers import OffsetConv2d
from .offset_limit import OffsetLimit

__all__ = ["DeformPSRoIPool", "DeformPSRoIPoolPack"]


@MODELS.register_module()
class DeformPSRoIPool(nn.Module):
    """Pools each bin of a RoI from its own channels, at its own offset.

    Args:
        output_size: Bins per RoI (Ph, Pw).
        spatial_scale: Size of the feature map relative to the image: 1 / stride.
        output_channels: Channels of the output, D.
        group_size: Position-sensitive cells per axis, each with D channels of its own. Default:
            ``output_size``, which has to be square.
        part_size: Offsets per axis. Default: ``output_size``, which has to be square.
        sample_per_part: Samples per bin and axis. Default: 4.
        trans_std: Offset of 1, as a fraction of the RoI's width or height. Default: 0.1.

    Raises:
        ValueError: ``output_size`` is not square and ``group_size`` or ``part_size`` is missing.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float,
        output_channels: int,
        group_size: int | None = None,
        part_size: int | None = None,
        sample_per_part: int = 4,
        trans_std: float = 0.1,
    ) -> None:
        super().__init__()
        self.output_size = _pair(output_size)
        self.spatial_scale = float(spatial_scale)
        self.output_channels = output_channels
        self.group_size = self._default_to_output_size("group_size", group_size)
        self.part_size = self._default_to_output_size("part_size", part_size)
        self.sample_per_part = sample_per_part
        self.trans_std = float(trans_std)

    def _default_to_output_size(self, name: str, size: int | None) -> int:
        if size is not None:
            return size
        if self.output_size[0] != self.output_size[1]:
            raise ValueError(
                f"{type(self).__name__}: {name} must be given where output_size is not square, "
                f"got output_size={self.output_size}"
            )
        return self.output_size[0]

    def forward(self, input: Tensor, rois: Tensor, offset: Tensor | None = None) -> Tensor:
        """Pools every RoI.

        Args:
            input: Score maps, shape (N, D * group_size**2, H, W), channels ordered as output
                channel, then cell (row-major).
            rois: (image index, x1, y1, x2, y2) in pixels of the image, shape (R, 5).
            offset: (x, y) of each class and part in ``trans_std`` times the RoI's size, shape
                (R, 2 * K, part_size, part_size) with K classes of D / K output channels. Default:
                zero.

        Returns:
            Shape (R, D, Ph, Pw).

        Raises:
            ValueError: A shape does not fit.
        """
        return deform_ps_roi_pool(
            input,
            rois,
            offset,
            self.output_size,
            self.spatial_scale,
            self.output_channels,
            self.group_size,
            self.part_size,
            self.sample_per_part,
            self.trans_std,
        )

    def extra_repr(self) -> str:
        names = (
            "output_size", "spatial_scale", "output_channels", "group_size", "part_size",
            "sample_per_part", "trans_std",
        )  # fmt: skip
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


@MODELS.register_module()
class DeformPSRoIPoolPack(OffsetLimit, DeformPSRoIPool):
    """The same with its fully convolutional offset branch.

    A 1x1 convolution turns features into position-sensitive maps of offsets, which the operator
    pools per RoI, like the score maps, but where the RoI stands. The convolution starts as zero: at
    first no bin moves.

    Args:
        in_channels: Channels of the features, C.
        output_size: Bins per RoI (Ph, Pw).
        spatial_scale: Size of score maps and features relative to the image: 1 / stride.
        output_channels: Channels of the output, D.
        num_classes: Classes K with offsets of their own, each of D / K output channels; divides D.
            Default: 1, which moves all channels alike.
        group_size: Position-sensitive cells per axis, each with D channels of its own. Default:
            ``output_size``, which has to be square.
        part_size: Offsets per axis. Default: ``output_size``, which has to be square.
        sample_per_part: Samples per bin and axis. Default: 4.
        trans_std: Offset of 1, as a fraction of the RoI's width or height. Default: 0.1.
        offset_range: Limits offsets smoothly to this many times ``trans_std`` of the RoI's size:
            r * tanh(offset / r). Default: none.
        offset_clamp: Limits them sharply, in the same unit. Default: none.

    Raises:
        ValueError: Arguments contradict each other.
    """

    def __init__(
        self,
        in_channels: int,
        output_size: int | tuple[int, int],
        spatial_scale: float,
        output_channels: int,
        num_classes: int = 1,
        group_size: int | None = None,
        part_size: int | None = None,
        sample_per_part: int = 4,
        trans_std: float = 0.1,
        offset_range: float | None = None,
        offset_clamp: float | None = None,
    ) -> None:
        super().__init__(
            output_size,
            spatial_scale,
            output_channels,
            group_size,
            part_size,
            sample_per_part,
            trans_std,
        )
        if num_classes < 1 or output_channels % num_classes:
            raise ValueError(
                f"DeformPSRoIPoolPack: output_channels must be divisible by num_classes, "
                f"got output_channels={output_channels}, num_classes={num_classes}"
            )
        self._set_offset_limit(offset_range, offset_clamp)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.conv_offset = OffsetConv2d(in_channels, 2 * self.part_size**2 * num_classes, 1)

    def predict_offset(self, features: Tensor, rois: Tensor) -> Tensor:
        """Predicts where the bins go.

        Args:
            features: Shape (N, C, H, W).
            rois: (image index, x1, y1, x2, y2) in pixels of the image, shape (R, 5).

        Returns:
            Offsets (x, y) in ``trans_std`` times the RoI's size, shape
            (R, 2 * K, part_size, part_size).
        """
        offset = deform_ps_roi_pool(
            self.conv_offset(features),
            rois,
            None,
            self.part_size,
            self.spatial_scale,
            2 * self.num_classes,
            self.part_size,
            self.part_size,
            self.sample_per_part,
            self.trans_std,
        )
        return self._limit_offset(offset)

    def forward(self, input: Tensor, rois: Tensor, features: Tensor) -> Tensor:
        """Pools every RoI from the score maps at offsets predicted from the features.

        Args:
            input: Score maps, shape (N, D * group_size**2, H, W).
            rois: (image index, x1, y1, x2, y2) in pixels of the image, shape (R, 5).
            features: Shape (N, C, H, W).

        Returns:
            Shape (R, D, Ph, Pw).

        Raises:
            ValueError: A shape does not fit.
        """
        return super().forward(input, rois, self.predict_offset(features, rois))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_classes={self.num_classes}"

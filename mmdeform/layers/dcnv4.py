"""DCNv4 as a convolution and as the published module.

The operator is ``mmdeform.ops.dcnv4``.

Source: Xiong et al., "Efficient Deformable ConvNets: Rethinking Dynamic and Sparse Operator for
Vision Applications" (2024), https://arxiv.org/abs/2401.06197.
"""

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair

from mmdeform.ops import dcnv4
from mmdeform.ops.dcnv4 import padded_channels, split_offset_mask
from mmdeform.registry import MODELS

from .dcn_base import DCNBase, IntPair, projection
from .offset_layers import OffsetLinear
from .offset_limit import OffsetLimit

__all__ = ["DCNv4"]


@MODELS.register_module()
class DCNv4(OffsetLimit, DCNBase):
    """Sums samples at predicted offsets with predicted, unbounded weights.

    Takes the place of an ``nn.Conv2d``, as ``conv_cfg`` or ``dcn`` of a config, and, with
    ``channels_last``, that of the published module, whose state dict it has.

    Offsets start as zero. The published weights start as zero, too, and so does the output. Behind
    a convolution stand a normalisation and ReLU, which pass no gradient through zeros: the layer
    would never learn. Therefore, without ``channels_last``, the weights start as the average of the
    window.

    Args:
        in_channels: Channels of the input, C.
        out_channels: Channels of the output, O; the output projection maps C to O.
        kernel_size: Kernel size (Kh, Kw).
        stride: Stride. Default: 1.
        padding: Zero padding on both sides. Default: 0.
        dilation: Distance between taps. Default: 1.
        groups: Must be 1; part of a convolution's interface.
        bias: Whether the output projection has a bias (``output_bias`` in the published module).
            Default: True.
        group: Groups of channels with offsets of their own; divides C. Default: by
            ``group_channels``.
        group_channels: Channels of a group where ``group`` is not given; divides C, unless C is
            smaller. Default: 16.
        offset_scale: Stretches the kernel, offsets included. Default: 1.0.
        dw_kernel_size: Kernel of a depthwise convolution in front of the prediction of the offsets.
            Default: none.
        center_feature_scale: Blends in the feature in the middle of each window by a learned
            share. Default: False.
        remove_center: Leaves out the middle tap. Default: False.
        without_pointwise: Leaves out the projections of value and output; needs C = O, and ``bias``
            is without effect. Default: False.
        channels_last: Input and output are (N, H, W, C). Default: False.
        offset_range: Limits offsets smoothly to this many times ``offset_scale`` pixels:
            r * tanh(offset / r). Default: none.
        offset_clamp: Limits them sharply, in the same unit. Default: none.

    Raises:
        ValueError: Arguments contradict each other.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: IntPair = 0,
        dilation: IntPair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        group: int | None = None,
        group_channels: int = 16,
        offset_scale: float = 1.0,
        dw_kernel_size: IntPair | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        without_pointwise: bool = False,
        channels_last: bool = False,
        offset_range: float | None = None,
        offset_clamp: float | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
            group, group_channels, offset_scale, center_feature_scale, remove_center, channels_last,
        )  # fmt: skip
        self._set_offset_limit(offset_range, offset_clamp)
        if without_pointwise and in_channels != out_channels:
            raise ValueError(
                f"DCNv4: without_pointwise needs in_channels equal to out_channels, "
                f"got {in_channels} and {out_channels}"
            )
        self.without_pointwise = without_pointwise
        self.dw_kernel_size = None if dw_kernel_size is None else _pair(dw_kernel_size)
        if self.dw_kernel_size is not None:
            self.offset_mask_dw = self._window_conv(self.dw_kernel_size)
        self.offset_mask = OffsetLinear(in_channels, padded_channels(self.group * self.taps))
        if not channels_last:
            self._start_as_average()
        if not without_pointwise:
            self.value_proj = projection(in_channels, in_channels)
            self.output_proj = projection(in_channels, out_channels, bias)

    @torch.no_grad()
    def _start_as_average(self) -> None:
        used = self.offset_mask.bias[: 3 * self.group * self.taps]
        used.view(self.group, 3 * self.taps)[:, 2 * self.taps :] = 1 / self.taps

    def predict_offset(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts where to sample and how to weigh the samples.

        Args:
            x: Input of the layer.

        Returns:
            Offsets (x, y) in units of ``offset_scale`` pixels, shape (N, Ho, Wo, G*K*2), and
            weights, shape (N, Ho, Wo, G*K), of each group and tap as in ``mmdeform.ops.dcnv3``.
        """
        offset_mask = self._predict(self._to_channels_last(x))
        return split_offset_mask(offset_mask, self.group, self.taps)

    def _predict(self, x: Tensor) -> Tensor:
        if self.dw_kernel_size is None:
            features = self._at_window_centers(x)
        else:
            features = self.offset_mask_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        offset_mask = self.offset_mask(features)
        if self.offset_range is None and self.offset_clamp is None:
            return offset_mask
        points = self.group * self.taps
        used, padding = offset_mask.split((3 * points, offset_mask.shape[-1] - 3 * points), -1)
        offset, mask = used.unflatten(-1, (self.group, -1)).split((2 * self.taps, self.taps), -1)
        used = torch.cat((self._limit_offset(offset), mask), -1).flatten(-2)
        return torch.cat((used, padding), -1)

    def _sample(self, x: Tensor) -> Tensor:
        value = x if self.without_pointwise else self.value_proj(x)
        output = dcnv4(
            value,
            self._predict(x),
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.group,
            self.offset_scale,
            self.remove_center,
        )
        if self.center_feature_scale:
            output = self._scale_center(output, value, query=output)
        return output if self.without_pointwise else self.output_proj(output)

"""DCNv3 as a convolution and as the published module.

The operator is ``mmdeform.ops.dcnv3``.

Source: Wang et al., "InternImage: Exploring Large-Scale Vision Foundation Models with Deformable
Convolutions" (2023), https://arxiv.org/abs/2211.05778.
"""

from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from mmdeform.ops import dcnv3
from mmdeform.registry import MODELS

from .dcn_base import DCNBase, IntPair, projection
from .offset_layers import OffsetLinear
from .offset_limit import OffsetLimit

__all__ = ["DCNv3"]

_ACTIVATIONS = {"ReLU": nn.ReLU, "SiLU": nn.SiLU, "GELU": nn.GELU}


class _ToChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


def _norm(name: str, channels: int) -> nn.Sequential:
    """Normalises (N, C, H, W) and gives (N, H, W, C); the order fixes names in the state dict."""
    if name == "LN":
        return nn.Sequential(_ToChannelsLast(), nn.LayerNorm(channels, eps=1e-6))
    return nn.Sequential(nn.BatchNorm2d(channels), _ToChannelsLast())


@MODELS.register_module()
class DCNv3(OffsetLimit, DCNBase):
    """Averages samples at predicted offsets with predicted weights, softmaxed over the window.

    Takes the place of an ``nn.Conv2d``, as ``conv_cfg`` or ``dcn`` of a config, and, with
    ``channels_last``, that of the published module, whose state dict it has. Unlike that one it
    works with any stride: offsets are predicted where the windows have their centres.

    Offsets start as zero: at first the layer averages its window between two projections.

    Args:
        in_channels: Channels of the input, C.
        out_channels: Channels of the output, O; the output projection maps C to O.
        kernel_size: Kernel size (Kh, Kw).
        stride: Stride. Default: 1.
        padding: Zero padding on both sides. Default: 0.
        dilation: Distance between taps. Default: 1.
        groups: Must be 1; part of a convolution's interface.
        bias: Whether the output projection has a bias. Default: True.
        group: Groups of channels with offsets of their own; divides C. Default: by
            ``group_channels``.
        group_channels: Channels of a group where ``group`` is not given; divides C, unless C is
            smaller. Default: 16.
        offset_scale: Stretches the kernel, offsets included. Default: 1.0.
        dw_kernel_size: Kernel of the depthwise convolution in front of the prediction of the
            offsets. Default: ``kernel_size``.
        act_layer: Activation behind it: 'GELU', 'ReLU' or 'SiLU'. Default: 'GELU'.
        norm_layer: Normalisation between them: 'LN' or 'BN'. Default: 'LN'.
        center_feature_scale: Blends in the feature in the middle of each window by a learned
            share. Default: False.
        remove_center: Leaves out the middle tap. Default: False.
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
        act_layer: str = "GELU",
        norm_layer: str = "LN",
        center_feature_scale: bool = False,
        remove_center: bool = False,
        channels_last: bool = False,
        offset_range: float | None = None,
        offset_clamp: float | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
            group, group_channels, offset_scale, center_feature_scale, remove_center, channels_last,
        )  # fmt: skip
        self._set_offset_limit(offset_range, offset_clamp)
        for name, value, known in (
            ("act_layer", act_layer, tuple(_ACTIVATIONS)),
            ("norm_layer", norm_layer, ("LN", "BN")),
        ):
            if value not in known:
                raise ValueError(f"DCNv3: {name} must be one of {known}, got {value!r}")
        self.dw_kernel_size = self.kernel_size if dw_kernel_size is None else _pair(dw_kernel_size)
        self.dw_conv = nn.Sequential(
            self._window_conv(self.dw_kernel_size),
            _norm(norm_layer, in_channels),
            _ACTIVATIONS[act_layer](),
        )
        self.offset = OffsetLinear(in_channels, self.group * self.taps * 2)
        self.mask = OffsetLinear(in_channels, self.group * self.taps)
        self.input_proj = projection(in_channels, in_channels)
        self.output_proj = projection(in_channels, out_channels, bias)

    def predict_offset(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts where to sample and how to weigh the samples.

        Args:
            x: Input of the layer.

        Returns:
            Offsets (x, y) in units of ``offset_scale`` pixels, shape (N, Ho, Wo, G*K*2), and
            weights, which sum to 1 over a window, shape (N, Ho, Wo, G*K), of each group and tap as
            in ``mmdeform.ops.dcnv3``.
        """
        return self._predict(self.dw_conv(self._to_channels_last(x).permute(0, 3, 1, 2)))

    def _predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        mask = self.mask(features).unflatten(-1, (self.group, self.taps)).softmax(-1)
        return self._limit_offset(self.offset(features)), mask.flatten(-2)

    def _sample(self, x: Tensor) -> Tensor:
        features = self.dw_conv(x.permute(0, 3, 1, 2))
        value = self.input_proj(x)
        output = dcnv3(
            value,
            *self._predict(features),
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.group,
            self.offset_scale,
            self.remove_center,
        )
        if self.center_feature_scale:
            output = self._scale_center(output, value, query=features)
        return self.output_proj(output)

"""Deformable convolution layers, v1 and v2, in place of mmcv's.

Each class derives from the mmcv class of the same name, because mmengine's ``dcn_offset_lr_mult``
and its bias rules look for those, and has the same arguments, parameters, initial values and state
dict. The operator is ``mmdeform.ops.deform_conv2d``. What mmcv's layers refuse works here: a bias
in v1, maps smaller than the kernel, any batch size, bf16.

Source: Dai et al., "Deformable Convolutional Networks" (2017); Zhu et al., "Deformable ConvNets v2"
(2018).
"""

import functools
from typing import Any

import torch
from mmcv.ops import deform_conv as mmcv_v1
from mmcv.ops import modulated_deform_conv as mmcv_v2
from mmengine.utils import deprecated_api_warning
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from mmdeform.ops import deform_conv2d
from mmdeform.registry import MODELS

from .offset_layers import OffsetConv2d
from .offset_limit import OffsetLimit

__all__ = [
    "DeformConv2d",
    "DeformConv2dPack",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
]

IntPair = int | tuple[int, int]
_RENAMED = {"deformable_groups": "deform_groups"}


class _DeformConvMixin:
    """What v1 and v2 share: checks that the operator cannot make, and the printed description.

    The operator reads the number of groups from the shapes of its arguments: it would compute
    arguments that contradict the layer with other groups.
    """

    def _check_groups(self, in_channels: int, out_channels: int, groups: int, deform: int) -> None:
        for name, channels, divisor_name, divisor in (
            ("in_channels", in_channels, "groups", groups),
            ("out_channels", out_channels, "groups", groups),
            ("in_channels", in_channels, "deform_groups", deform),
        ):
            if divisor < 1 or channels % divisor:
                raise ValueError(
                    f"{type(self).__name__}: {name} must be divisible by {divisor_name}, "
                    f"got {name}={channels}, {divisor_name}={divisor}"
                )

    def _check_channels(self, name: str, tensor: Tensor, expected: int) -> None:
        if tensor.dim() != 4 or tensor.shape[1] != expected:
            raise ValueError(
                f"{type(self).__name__}: {name} must have shape (N, {expected}, H, W), "
                f"got {tuple(tensor.shape)}"
            )

    def _check_inputs(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> None:
        points = self.deform_groups * self.kernel_size[0] * self.kernel_size[1]
        self._check_channels("x", x, self.in_channels)
        self._check_channels("offset", offset, 2 * points)
        if mask is not None:
            self._check_channels("mask", mask, points)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, deform_groups={self.deform_groups}, "
            f"bias={self.bias is not None}"
        )

    __repr__ = nn.Module.__repr__  # mmcv's v1 has one that hides conv_offset
    # mmcv's announces an upgrade at every load; old keys are the parent's matter, see below.
    _load_from_state_dict = nn.Module._load_from_state_dict


@MODELS.register_module(["DeformConv2d", "DeformConv"])
class DeformConv2d(_DeformConvMixin, mmcv_v1.DeformConv2d):
    """Deformable convolution (v1) that takes the offsets as an input.

    Args:
        in_channels: Channels of the input, C.
        out_channels: Channels of the output, O.
        kernel_size: Kernel size (Kh, Kw).
        stride: Stride. Default: 1.
        padding: Zero padding on both sides. Default: 0.
        dilation: Distance between taps. Default: 1.
        groups: Convolution groups; divides C and O. Default: 1.
        deform_groups: Groups of channels D that share offsets; divides C. Default: 1.
        bias: Adds a learnable bias, initially zero. Default: False.
        im2col_step: Accepted for configs written for mmcv; without effect.

    Raises:
        ValueError: Channels are not divisible by the groups.
    """

    @deprecated_api_warning(_RENAMED, cls_name="DeformConv2d")
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: IntPair = 0,
        dilation: IntPair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool | str = False,
        im2col_step: int = 32,
    ) -> None:
        self._check_groups(in_channels, out_channels, groups, deform_groups)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            deform_groups,
            bias=False,  # mmcv's v1 has none
            im2col_step=im2col_step,
        )
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_channels)) if bias else None)

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """Samples ``x`` at the offsets and convolves.

        Args:
            x: Input, shape (N, C, H, W).
            offset: Offsets in input pixels, shape (N, D*Kh*Kw*2, Ho, Wo), channels ordered as
                deform group, tap (row-major), then (dy, dx).

        Returns:
            Shape (N, O, Ho, Wo).

        Raises:
            ValueError: A shape does not fit the layer.
        """
        self._check_inputs(x, offset)
        return deform_conv2d(
            x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation
        )


@MODELS.register_module(["DCN", "DCNv1", "DeformConv2dPack", "DeformConvPack"])
class DeformConv2dPack(OffsetLimit, DeformConv2d, mmcv_v1.DeformConv2dPack):
    """Deformable convolution (v1) that predicts its own offsets, for ``nn.Conv2d``.

    The offsets start as zero: at first the layer is the plain convolution of its weight.

    Args: those of :class:`DeformConv2d`, and
        offset_range: Limits offsets smoothly to this many input pixels: r * tanh(offset / r).
            Default: none.
        offset_clamp: Limits them sharply, in the same unit. Default: none.
    """

    def __init__(
        self,
        *args: Any,
        offset_range: float | None = None,
        offset_clamp: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._set_offset_limit(offset_range, offset_clamp)
        self.conv_offset = _offset_conv(self, channels_per_point=2)

    def predict_offset(self, x: Tensor) -> tuple[Tensor, None]:
        """Predicts where to sample.

        Args:
            x: Input, shape (N, C, H, W).

        Returns:
            Offsets in input pixels, shape (N, D*Kh*Kw*2, Ho, Wo), as in :class:`DeformConv2d`; and
            None, for v1 has no mask.
        """
        return self._limit_offset(self.conv_offset(x)), None

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, O, Ho, Wo)."""
        offset, _ = self.predict_offset(x)
        return super().forward(x, offset)


@MODELS.register_module(["ModulatedDeformConv2d", "ModulatedDeformConv"])
class ModulatedDeformConv2d(_DeformConvMixin, mmcv_v2.ModulatedDeformConv2d):
    """Modulated deformable convolution (v2) that takes offsets and mask as inputs.

    Args:
        in_channels: Channels of the input, C.
        out_channels: Channels of the output, O.
        kernel_size: Kernel size (Kh, Kw).
        stride: Stride. Default: 1.
        padding: Zero padding on both sides. Default: 0.
        dilation: Distance between taps. Default: 1.
        groups: Convolution groups; divides C and O. Default: 1.
        deform_groups: Groups of channels D that share offsets and mask; divides C. Default: 1.
        bias: Adds a learnable bias, initially zero. Default: True.
        im2col_step: Accepted for configs that also serve v1; without effect.

    Raises:
        ValueError: Channels are not divisible by the groups.
    """

    @deprecated_api_warning(_RENAMED, cls_name="ModulatedDeformConv2d")
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: IntPair = 0,
        dilation: IntPair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool | str = True,
        im2col_step: int = 32,
    ) -> None:
        self._check_groups(in_channels, out_channels, groups, deform_groups)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            deform_groups,
            bias,
        )

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """Samples ``x`` at the offsets, weighs the samples with the mask and convolves.

        Args:
            x: Input, shape (N, C, H, W).
            offset: Offsets in input pixels, shape (N, D*Kh*Kw*2, Ho, Wo), channels ordered as
                deform group, tap (row-major), then (dy, dx).
            mask: Weights of the samples, shape (N, D*Kh*Kw, Ho, Wo), channels ordered as deform
                group, then tap.

        Returns:
            Shape (N, O, Ho, Wo).

        Raises:
            ValueError: A shape does not fit the layer.
        """
        self._check_inputs(x, offset, mask)
        return deform_conv2d(
            x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask
        )


@MODELS.register_module(["DCNv2", "ModulatedDeformConv2dPack", "ModulatedDeformConvPack"])
class ModulatedDeformConv2dPack(
    OffsetLimit, ModulatedDeformConv2d, mmcv_v2.ModulatedDeformConv2dPack
):
    """Modulated deformable convolution (v2) that predicts offsets and mask, for ``nn.Conv2d``.

    Offsets start as zero and the mask as 0.5: at first the layer is half of the plain convolution
    of its weight, plus the bias.

    Args: those of :class:`ModulatedDeformConv2d`, and
        offset_range: Limits offsets smoothly to this many input pixels: r * tanh(offset / r).
            Default: none.
        offset_clamp: Limits them sharply, in the same unit. Default: none.
    """

    def __init__(
        self,
        *args: Any,
        offset_range: float | None = None,
        offset_clamp: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._set_offset_limit(offset_range, offset_clamp)
        self.conv_offset = _offset_conv(self, channels_per_point=3)

    def predict_offset(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts where to sample and how to weigh the samples.

        Args:
            x: Input, shape (N, C, H, W).

        Returns:
            Offsets in input pixels, shape (N, D*Kh*Kw*2, Ho, Wo), and mask in (0, 1), shape
            (N, D*Kh*Kw, Ho, Wo), as in :class:`ModulatedDeformConv2d`.
        """
        # The first two thirds are the offset channels as they stand: (dy, dx) pairs, not all dy and
        # then all dx.
        first, second, mask = self.conv_offset(x).chunk(3, dim=1)
        return self._limit_offset(torch.cat((first, second), dim=1)), mask.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, O, Ho, Wo)."""
        offset, mask = self.predict_offset(x)
        return super().forward(x, offset, mask)


def _offset_conv(layer: Any, channels_per_point: int) -> OffsetConv2d:
    kernel_h, kernel_w = layer.kernel_size
    return OffsetConv2d(
        layer.in_channels,
        layer.deform_groups * channels_per_point * kernel_h * kernel_w,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
    )


def _rename_old_keys(name: str, parent: nn.Module, state_dict: dict, prefix: str, *_: Any) -> None:
    for parameter in ("weight", "bias"):
        old = f"{prefix}{name}_offset.{parameter}"
        new = f"{prefix}{name}.conv_offset.{parameter}"
        if old in state_dict and new not in state_dict:
            state_dict[new] = state_dict.pop(old)


def _accept_old_keys(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Lets ``parent`` load checkpoints in which the offset layer stood beside the convolution.

    Before version 2 the keys were ``conv2_offset.weight`` instead of ``conv2.conv_offset.weight``.
    mmcv renames them when the convolution itself is loaded, but torch and mmengine now give a
    module only the entries under its own name, so that its parent has to do it.
    """
    if isinstance(child, (DeformConv2dPack, ModulatedDeformConv2dPack)):
        parent.register_load_state_dict_pre_hook(functools.partial(_rename_old_keys, name))


register_module_module_registration_hook(_accept_old_keys)

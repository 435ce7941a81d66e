"""What DCNv3 and DCNv4 share: a convolution's interface around deformable sampling."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.utils import _pair

from mmdeform.ops.deform_conv2d import output_size

__all__ = ["DCNBase", "WindowConv2d", "projection"]

IntPair = int | tuple[int, int]


class WindowConv2d(nn.Conv2d):
    """A depthwise convolution at the places where another convolution has its windows.

    Args:
        channels: Channels of input and output.
        kernel_size: (Kh, Kw).
        stride: (vertical, horizontal).
        window_padding: Zero padding (left, right, top, bottom); negative values crop.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        window_padding: tuple[int, int, int, int],
    ) -> None:
        left, right, top, bottom = window_padding
        plain = left == right >= 0 and top == bottom >= 0
        padding = (top, left) if plain else 0
        super().__init__(channels, channels, kernel_size, stride, padding, groups=channels)
        self.window_padding = None if plain else window_padding

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C, Ho, Wo)."""
        if self.window_padding is not None:
            x = functional.pad(x, self.window_padding)
        return super().forward(x)


class DCNBase(nn.Module):
    """Geometry, groups, layouts and centre features of a layer that samples each channel alone.

    Subclasses define ``_sample``, which maps (N, H, W, C) to (N, Ho, Wo, out_channels).
    """

    # What ConvModule reads of a convolution.
    transposed = False
    output_padding = (0, 0)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair,
        padding: IntPair,
        dilation: IntPair,
        groups: int,
        group: int | None,
        group_channels: int,
        offset_scale: float,
        center_feature_scale: bool,
        remove_center: bool,
        channels_last: bool,
    ) -> None:
        super().__init__()
        if groups != 1:
            raise ValueError(
                f"{type(self).__name__}: groups must be 1, got {groups}: every channel is sampled "
                "alone; `group` tells how many sets of offsets there are"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair(kernel_size)
        self.stride = _pair(stride)
        self.padding = _pair(padding)
        self.dilation = _pair(dilation)
        self.groups = groups
        self.group = self._number_of_groups(group, group_channels)
        self.group_channels = in_channels // self.group
        self.offset_scale = offset_scale
        self.center_feature_scale = center_feature_scale
        self.remove_center = remove_center
        self.channels_last = channels_last
        kernel_h, kernel_w = self.kernel_size
        if remove_center and (kernel_h != kernel_w or kernel_h % 2 == 0):
            raise ValueError(
                f"{type(self).__name__}: remove_center needs an odd, square kernel_size, "
                f"got {self.kernel_size}"
            )
        self.taps = kernel_h * kernel_w - int(remove_center)
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(
                torch.zeros(self.group, in_channels)
            )
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(self.group))

    def _number_of_groups(self, group: int | None, group_channels: int) -> int:
        if group is None and 0 < self.in_channels <= group_channels:
            return 1
        name, divisor = "group", group
        if group is None:
            name, divisor = "group_channels", group_channels
        if divisor < 1 or self.in_channels % divisor:
            raise ValueError(
                f"{type(self).__name__}: in_channels must be divisible by {name}, "
                f"got in_channels={self.in_channels}, {name}={divisor}"
            )
        return self.in_channels // divisor if group is None else divisor

    def _window_padding(self, kernel_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Padding (left, right, top, bottom) that centres another kernel in this layer's windows.

        A convolution of that kernel with this padding and the layer's stride has one output for
        each of the layer's.
        """
        sides: list[int] = []
        for axis in (1, 0):
            extent = self.dilation[axis] * (self.kernel_size[axis] - 1)
            other = kernel_size[axis] - 1
            before = self.padding[axis] - extent // 2 + other // 2
            sides += [before, 2 * self.padding[axis] - extent + other - before]
        left, right, top, bottom = sides
        return left, right, top, bottom

    def _window_conv(self, kernel_size: tuple[int, int]) -> WindowConv2d:
        padding = self._window_padding(kernel_size)
        return WindowConv2d(self.in_channels, kernel_size, self.stride, padding)

    def _at_window_centers(self, x: Tensor) -> Tensor:
        """Takes from (N, H, W, C) the pixels (N, Ho, Wo, C) in the middle of the windows."""
        padding = self._window_padding((1, 1))
        if any(padding):
            x = functional.pad(x, (0, 0, *padding))
        return x[:, :: self.stride[0], :: self.stride[1]]

    def _scale_center(self, output: Tensor, value: Tensor, query: Tensor) -> Tensor:
        """Replaces a learned share of each group's output by the feature in the middle."""
        scale = functional.linear(
            query, self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
        ).sigmoid()
        scale = scale[..., None].expand(*scale.shape, self.group_channels).flatten(-2)
        return output * (1 - scale) + self._at_window_centers(value) * scale

    def _to_channels_last(self, x: Tensor) -> Tensor:
        """Checks the input and gives it as (N, H, W, C)."""
        if x.dim() != 4 or x.shape[3 if self.channels_last else 1] != self.in_channels:
            layout = "H, W, {}" if self.channels_last else "{}, H, W"
            raise ValueError(
                f"{type(self).__name__}: x must have shape (N, {layout.format(self.in_channels)}), "
                f"got {tuple(x.shape)}"
            )
        x = x if self.channels_last else x.permute(0, 2, 3, 1)
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation)
        if min(output_size((x.shape[1], x.shape[2]), *geometry)) < 1:
            raise ValueError(
                f"{type(self).__name__}: x of {x.shape[1]} x {x.shape[2]} pixels is smaller than "
                f"the kernel {self.kernel_size} with padding {self.padding} and dilation "
                f"{self.dilation}"
            )
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, O, Ho, Wo), or (N, H, W, C) to (N, Ho, Wo, O).

        The sizes are a convolution's. The output is channels last in memory in any case.

        Raises:
            ValueError: The shape does not fit the layer.
        """
        output = self._sample(self._to_channels_last(x))
        return output if self.channels_last else output.permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        parts = [
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}",
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}",
            f"group={self.group}, offset_scale={self.offset_scale}",
        ]
        flags = ("center_feature_scale", "remove_center", "channels_last")
        return ", ".join(parts + [f"{flag}=True" for flag in flags if getattr(self, flag)])


def projection(in_channels: int, out_channels: int, bias: bool = True) -> nn.Linear:
    """A linear layer as published: Xavier weights, zero bias."""
    layer = nn.Linear(in_channels, out_channels, bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer

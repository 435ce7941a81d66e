"""Layers that predict offsets: zero at first, and still zero after ``init_weights``.

mmengine's ``init_cfg`` picks layers by their class name and the names of their direct bases. A
direct subclass of ``nn.Conv2d`` or ``nn.Linear`` would be given Kaiming or Xavier values by every
backbone and neck; a subclass of a subclass is left alone, and remains one to ``isinstance``.
"""

from torch import nn

__all__ = ["OffsetConv2d", "OffsetLinear"]


class _Zero:
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class _ZeroConv2d(_Zero, nn.Conv2d):
    """A convolution whose initial weight and bias are zero."""


class _ZeroLinear(_Zero, nn.Linear):
    """A linear layer whose initial weight and bias are zero."""


class OffsetConv2d(_ZeroConv2d):
    """The convolution that predicts offsets; an ``nn.Conv2d`` to ``dcn_offset_lr_mult``."""


class OffsetLinear(_ZeroLinear):
    """The linear layer that predicts offsets."""

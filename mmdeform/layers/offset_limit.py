"""How far predicted offsets may go: two options of every layer that predicts them."""

from math import inf
from numbers import Real

import torch
from torch import Tensor

__all__ = ["OffsetLimit"]


class OffsetLimit:
    """Gives a layer the options ``offset_range`` and ``offset_clamp``; comes first among its bases.

    ``offset_range``, r, makes r * tanh(offset / r) of an offset: hardly a change while it is small,
    at most r, and a gradient wherever it is. ``offset_clamp``, c, leaves offsets in [-c, c] as they
    are and cuts off others, which then get no gradient and move only through what they share with
    others. Both count in the unit of the layer's offsets, x and y alone. NaN stays NaN.
    """

    offset_range: float | None = None
    offset_clamp: float | None = None

    def _set_offset_limit(self, offset_range: float | None, offset_clamp: float | None) -> None:
        for name, value in (("offset_range", offset_range), ("offset_clamp", offset_clamp)):
            number = isinstance(value, Real) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < inf):
                raise ValueError(
                    f"{type(self).__name__}: {name} must be a positive number or None, "
                    f"got {value!r}"
                )
        if offset_range is not None and offset_clamp is not None:
            raise ValueError(
                f"{type(self).__name__}: offset_range and offset_clamp exclude each other, "
                f"got {offset_range} and {offset_clamp}"
            )
        self.offset_range = offset_range
        self.offset_clamp = offset_clamp

    def _limit_offset(self, offset: Tensor) -> Tensor:
        if self.offset_range is not None:
            # In half precision each of three roundings would move even the smallest offsets.
            wide = offset.to(torch.promote_types(offset.dtype, torch.float32))
            return (torch.tanh(wide / self.offset_range) * self.offset_range).to(offset.dtype)
        if self.offset_clamp is not None:
            return offset.clamp(-self.offset_clamp, self.offset_clamp)
        return offset

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]  # type: ignore[misc]
        for name in ("offset_range", "offset_clamp"):
            if getattr(self, name) is not None:
                parts.append(f"{name}={getattr(self, name)}")
        return ", ".join(filter(None, parts))

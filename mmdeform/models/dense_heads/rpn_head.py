"""A region proposal network that need not read what the RoI head reads.

Source: Ren et al., "Faster R-CNN" (2015), https://arxiv.org/abs/1506.01497; the head is mmdet's.
"""

from collections.abc import Sequence
from typing import Any

from mmdet.models.dense_heads import RPNHead as MMDetRPNHead
from torch import Tensor

from mmdeform.registry import MODELS

__all__ = ["RPNHead"]


@MODELS.register_module()
class RPNHead(MMDetRPNHead):
    """mmdet's RPN on some of the maps, such as c4 of a detector whose RoI head reads c5.

    Args: those of mmdet's ``RPNHead``, and
        in_indices: Which of the neck's maps it reads, one per level of the anchors. Default: all.

    Raises:
        ValueError: There are more or fewer maps to read than levels of anchors.
    """

    def __init__(
        self, in_channels: int, in_indices: Sequence[int] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(in_channels, **kwargs)
        self.in_indices = None if in_indices is None else tuple(in_indices)
        levels = self.prior_generator.num_levels
        if self.in_indices is not None and len(self.in_indices) != levels:
            raise ValueError(
                f"in_indices: expected an index for each of the {levels} levels of anchors, "
                f"got {in_indices}"
            )

    def forward(self, x: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Scores and box deltas of every level.

        Args:
            x: Feature maps, shape (N, C, H, W) each.

        Returns:
            Logits, shape (N, anchors, H, W), and deltas, shape (N, 4 * anchors, H, W), per level.

        Raises:
            IndexError: There is no such map.
        """
        return super().forward(x if self.in_indices is None else [x[i] for i in self.in_indices])

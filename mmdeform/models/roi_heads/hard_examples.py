"""Online hard example mining.

Source: Shrivastava et al., "Training Region-based Object Detectors with Online Hard Example Mining"
(2016), https://arxiv.org/abs/1604.03540.
"""

import torch
from torch import Tensor

__all__ = ["hardest"]


def hardest(losses: Tensor, images: Tensor, count: int) -> Tensor:
    """The examples of each image with the largest losses.

    Args:
        losses: Loss of each example, shape (R,).
        images: Index of its image, shape (R,).
        count: How many of each image; all where it has no more.

    Returns:
        Indices, int64, image by image, the hardest first.
    """
    chosen = [images.new_empty(0, dtype=torch.long)]
    for image in images.unique():
        own = (images == image).nonzero().squeeze(1)
        chosen.append(own[losses[own].topk(min(count, len(own))).indices])
    return torch.cat(chosen)

"""Crops of an image, as R-CNN sees them."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["crop_boxes"]


@torch.no_grad()
def crop_boxes(image: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cuts boxes out of an image and resizes each to a square, bilinearly.

    What a box has outside of the image is cut off. Of a box that is thinner than a pixel, or lies
    outside, the nearest pixel's width remains. There are no gradients: boxes are places.

    Args:
        image: Without padding, shape (C, H, W).
        boxes: (x1, y1, x2, y2) in pixels of the image, dtype of the image, shape (R, 4).
        size: Height and width of the crops.

    Returns:
        Shape (R, C, size, size).
    """
    height, width = image.shape[-2:]
    x = _sample_positions(boxes[:, 0], boxes[:, 2], width, size)[:, None, :]
    y = _sample_positions(boxes[:, 1], boxes[:, 3], height, size)[:, :, None]
    grid = torch.stack(torch.broadcast_tensors(x, y), dim=-1)
    images = image.expand(len(boxes), -1, -1, -1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _sample_positions(start: Tensor, end: Tensor, length: int, size: int) -> Tensor:
    """Centres of a crop's pixels along one axis of the image, which reaches from -1 to 1."""
    start = start.clamp(0, length - 1)[:, None]
    extent = (end.clamp(max=length)[:, None] - start).clamp(min=1)
    centres = (torch.arange(size, device=start.device, dtype=start.dtype) + 0.5) / size
    positions = start + extent * centres
    # Interpolation reads half a pixel to both sides: that is not to be the surroundings.
    positions = positions.clamp(start + 0.5, start + extent - 0.5)
    return 2 * positions / length - 1

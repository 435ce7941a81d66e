"""What the tests of DCNv3 and DCNv4 share: their layers written with plain sampling."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmdeform.layers import DCNv3, DCNv4

# Every way in which windows and offsets can get out of step.
GEOMETRIES = [
    dict(kernel_size=3, padding=1),
    dict(kernel_size=3, padding=1, stride=2),
    dict(kernel_size=3),
    dict(kernel_size=3, padding=2, dilation=2),
    dict(kernel_size=3, stride=2, padding=3, dilation=2),
    dict(kernel_size=(3, 2), stride=(2, 1), padding=(1, 0)),
    dict(kernel_size=(2, 4), stride=(1, 3), padding=(2, 0), dilation=(1, 2)),
    dict(kernel_size=5, stride=3),
    dict(kernel_size=1),
]


def randomise(layer: nn.Module) -> None:
    """Gives every parameter values that move samples by about a pixel."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(std=0.3)
            if "norm" in name:
                parameter.add_(1)


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def window_centers(layer: DCNv3 | DCNv4, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows (Ho) and columns (Wo) of the pixels in the middle of the windows."""
    centers = []
    for axis in (0, 1):
        kernel, stride = layer.kernel_size[axis], layer.stride[axis]
        padding, dilation = layer.padding[axis], layer.dilation[axis]
        count = (size[axis] + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        centers.append(torch.arange(count) * stride - padding + dilation * (kernel - 1) // 2)
    return centers[0], centers[1]


def pixels_at(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels (N, Ho, Wo, C) of x (N, H, W, C), zero outside."""
    height, width = x.shape[1:3]
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
    values = x[:, rows.clamp(0, height - 1)][:, :, columns.clamp(0, width - 1)]
    return values * inside[..., None]


def sample_windows(layer: DCNv3 | DCNv4, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    """Sums the samples of all taps with grid_sample: (N, H, W, C) to (N, Ho, Wo, C)."""
    batch, height, width, _ = x.shape
    rows, columns = window_centers(layer, (height, width))
    kernel_h, kernel_w = layer.kernel_size
    grid = torch.tensor(  # column-major
        [
            (ix * layer.dilation[1], iy * layer.dilation[0])
            for ix in range(kernel_w)
            for iy in range(kernel_h)
            if not (layer.remove_center and ix == iy == kernel_h // 2)
        ]
    ).float()
    middle = [layer.dilation[axis] * (layer.kernel_size[axis] - 1) // 2 for axis in (1, 0)]
    shape = (batch, len(rows), len(columns), layer.group, len(grid))
    place = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)[None, :, :, None, None]
    shift = grid - torch.tensor(middle) + offset.view(*shape, 2)
    place = place + layer.offset_scale * shift  # (N, Ho, Wo, G, K, 2) as (x, y)
    place = (place + 0.5) / torch.tensor([width, height]) * 2 - 1
    place = place.movedim(3, 1).reshape(batch * layer.group, len(rows), -1, 2)
    groups = x.view(batch, height, width, layer.group, -1).permute(0, 3, 4, 1, 2).flatten(0, 1)
    samples = functional.grid_sample(groups, place, align_corners=False)
    samples = samples.view(batch, layer.group, -1, len(rows), len(columns), len(grid))
    weights = mask.view(shape).permute(0, 3, 1, 2, 4)[:, :, None]
    output = (samples * weights).sum(-1)  # (N, G, C/G, Ho, Wo)
    return output.permute(0, 3, 4, 1, 2).flatten(3)

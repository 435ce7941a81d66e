import torch
from mmdet.models import FPN
from mmdet.registry import MODELS
from torch import nn


@MODELS.register_module()
class AttentiveFPN(FPN):
    """A feature pyramid whose levels are scaled channel by channel."""

    def __init__(self, out_channels: int, **kwargs) -> None:
        super().__init__(out_channels=out_channels, **kwargs)
        self.scale = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        levels = super().forward(inputs)
        return tuple(x * self.scale(x.mean((2, 3), keepdim=True)).sigmoid() for x in levels)

"""What follows the attention of a block."""

from collections import OrderedDict

from torch import Tensor, nn

__all__ = ["MLP", "ConvMLP"]


class MLP(nn.Module):
    """Two linear layers with a GELU between them, for each pixel.

    Args:
        dims: Channels of input and output.
        hidden_dims: Channels between the layers.
        drop: Dropout after the activation and at the end. Default: 0.0.
    """

    def __init__(self, dims: int, hidden_dims: int, drop: float = 0.0) -> None:
        super().__init__()
        self.chunk = nn.Sequential(
            OrderedDict(
                linear1=nn.Linear(dims, hidden_dims),
                act=nn.GELU(),
                drop1=nn.Dropout(drop),
                linear2=nn.Linear(hidden_dims, dims),
                drop2=nn.Dropout(drop),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        return self.chunk(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvMLP(nn.Module):
    """The same with a depthwise 3x3 convolution, as a residual, in front of the GELU (DAT++).

    Args: those of :class:`MLP`.
    """

    def __init__(self, dims: int, hidden_dims: int, drop: float = 0.0) -> None:
        super().__init__()
        # Sequences of one: the names of the published state dict.
        self.linear1 = nn.Sequential(nn.Conv2d(dims, hidden_dims, 1))
        self.drop1 = nn.Dropout(drop)
        self.act = nn.GELU()
        self.linear2 = nn.Sequential(nn.Conv2d(hidden_dims, dims, 1))
        self.drop2 = nn.Dropout(drop)
        self.dwc = nn.Conv2d(hidden_dims, hidden_dims, 3, padding=1, groups=hidden_dims)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        x = self.drop1(self.linear1(x))
        return self.drop2(self.linear2(self.act(x + self.dwc(x))))

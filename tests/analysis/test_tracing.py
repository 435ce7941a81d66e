"""Traced points are where a stack of layers really reads."""

import pytest
import torch
from torch import nn

pytest.importorskip("mmcv.ops")
from mmcv.ops import ModulatedDeformConv2dPack as MmcvDCNv2

from mmdeform.analysis.recording import record
from mmdeform.analysis.tracing import trace_points
from mmdeform.layers import DCNv3, DCNv4, DeformConv2dPack, ModulatedDeformConv2dPack


class Stack(nn.Module):
    """Two deformable convolutions, the first after a stride of 2, with fixed whole offsets."""

    def __init__(self, stem: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 1, stem, stride=2, bias=False)
        self.first = ModulatedDeformConv2dPack(1, 1, 3, stride=2, padding=1, bias=False)
        self.second = ModulatedDeformConv2dPack(1, 1, 3, padding=1, bias=False)
        for parameter in self.parameters():
            nn.init.ones_(parameter)
        for layer in (self.first, self.second):
            nn.init.zeros_(layer.conv_offset.weight)
            nn.init.zeros_(layer.conv_offset.bias)
            layer.conv_offset.bias.data[:18] = torch.randint(-2, 3, (18,)).float()
            layer.conv_offset.bias.data[18:] = torch.randn(9)  # modulation

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.stem(inputs)))


@pytest.mark.parametrize("stem", [1, 2])
def test_traced_points_are_the_pixels_that_are_read(stem: int) -> None:
    model = Stack(stem)
    image = torch.zeros(1, 1, 64, 48, requires_grad=True)
    with record(model) as recording:
        output = model(image)
    assert recording.names == ["first", "second"]

    row, column = 9, 4
    (gradient,) = torch.autograd.grad(output[0, 0, row, column], image)
    half = (stem - 1) / 2  # patches of 2 x 2 pixels have their centres between pixels
    x, y = 4 * column + half, 4 * row + half
    points, weights = trace_points(recording, x=x + 1, y=y - 1)
    assert points.shape == (81, 2)
    # Each pixel's gradient is the sum of the weights of the points that fall on it.
    summed = torch.zeros(64, 48)
    corners = (points - half).round().long()
    torch.testing.assert_close(points, corners + half)
    for (x, y), weight in zip(corners.tolist(), weights, strict=True):
        if 0 <= x < 48 and 0 <= y < 64:
            summed[y : y + stem, x : x + stem] += weight
    torch.testing.assert_close(summed, gradient[0, 0])
    assert len(gradient.nonzero()) > 20


def test_without_offsets_the_points_are_the_regular_grid() -> None:
    with record(model := Stack()) as recording:
        model(torch.zeros(2, 1, 64, 48))
    second = recording["second"]
    points, weights = trace_points([second], x=16, y=36, image=1, offsets=False)
    expected = {(x, y) for x in (12, 16, 20) for y in (32, 36, 40)}
    assert {tuple(point) for point in points.int().tolist()} == expected
    assert (weights == 1).all()
    torch.testing.assert_close(
        trace_points([second], 16, 36)[0],
        points + 4 * model.second.conv_offset.bias[:18].view(9, 2).flip(1),
    )


def test_groups_and_images_are_told_apart() -> None:
    layer = DeformConv2dPack(2, 3, 3, padding=1, deform_groups=2)
    nn.init.normal_(layer.conv_offset.weight)
    with record(layer) as recording:
        layer(torch.randn(2, 2, 5, 7))
    (call,) = recording
    for image in (0, 1):
        for group in (0, 1):
            points, weights = trace_points([call], 4, 2, image, group)
            assert torch.equal(points, call.locations[image, group, :, 2, 4])
            assert torch.equal(weights, torch.ones(9))  # version 1 weighs all alike
    with pytest.raises(ValueError, match="group must be between 0 and 1 in , but got 2"):
        trace_points([call], 4, 2, group=2)


@pytest.mark.parametrize("kind", [DCNv3, DCNv4, MmcvDCNv2])
def test_other_classes_are_traced_alike(kind: type) -> None:
    with record(model := kind(4, 4, 3, stride=2, padding=1)) as recording:
        model(torch.zeros(2, 4, 12, 16))
    points, _ = trace_points(recording, x=4, y=6)
    expected = {(x, y) for x in (3, 4, 5) for y in (5, 6, 7)}
    assert {tuple(point) for point in points.int().tolist()} == expected


def test_points_outside_a_map_end_there() -> None:
    with record(model := Stack()) as recording:
        model(torch.zeros(1, 1, 64, 48))
    corner, weights = trace_points(recording, x=0, y=0, offsets=False)
    assert corner.shape == (4 * 9, 2) and weights.shape == (36,)
    beyond, _ = trace_points(recording, x=-100, y=-100, offsets=False)
    torch.testing.assert_close(beyond, corner)  # the nearest output


def test_no_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="calls must hold at least one"):
        trace_points([], 0, 0)

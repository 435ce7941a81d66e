"""Recorded sampling points are where the layers really read."""

import pytest
import torch
from torch import nn

pytest.importorskip("mmcv.ops")
from mmcv.ops import ModulatedDeformConv2dPack as MmcvDCNv2

from mmdeform.analysis.sampling import record_sampling, trace_points
from mmdeform.layers import (
    DCNv3,
    DCNv4,
    DeformConv2dPack,
    DeformRoIPoolPack,
    ModulatedDeformConv2dPack,
)


class Stack(nn.Module):
    """Two deformable convolutions, the first after a stride of 2, with fixed whole offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 1, 1, stride=2, bias=False)
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


@pytest.mark.parametrize("keyword", [False, True])
def test_traced_points_are_the_pixels_that_are_read(keyword: bool) -> None:
    model = Stack()
    image = torch.zeros(1, 1, 64, 48, requires_grad=True)
    with record_sampling(model) as layers:
        output = model(inputs=image) if keyword else model(image)
    assert list(layers) == ["first", "second"]
    assert [layer.stride for layer in layers.values()] == [(4, 4), (4, 4)]

    row, column = 9, 4
    (gradient,) = torch.autograd.grad(output[0, 0, row, column], image)
    read = {(x, y) for y, x in gradient[0, 0].nonzero().tolist()}
    points, weights = trace_points(list(layers.values()), x=4 * column + 1, y=4 * row - 1)
    assert points.shape == (81, 2)
    traced = {(int(x), int(y)) for x, y in points.tolist() if 0 <= x < 48 and 0 <= y < 64}
    assert traced == read and len(read) > 20
    # Each pixel's gradient is the sum of the weights of the points that fall on it.
    summed = torch.zeros(64, 48)
    for (x, y), weight in zip(points.long().tolist(), weights, strict=True):
        if 0 <= x < 48 and 0 <= y < 64:
            summed[y, x] += weight
    torch.testing.assert_close(summed, gradient[0, 0])


def test_without_offsets_the_points_are_the_regular_grid() -> None:
    with record_sampling(model := Stack()) as layers:
        model(torch.zeros(2, 1, 64, 48))
    second = layers["second"]
    points, weights = trace_points([second], x=16, y=36, image=1, offsets=False)
    expected = {(x, y) for x in (12, 16, 20) for y in (32, 36, 40)}
    assert {tuple(point) for point in points.int().tolist()} == expected
    assert (weights == 1).all()
    torch.testing.assert_close(
        trace_points([second], 16, 36)[0],
        points + 4 * model.second.conv_offset.bias[:18].view(9, 2).flip(1),
    )


def test_version_1_weighs_all_points_equally() -> None:
    with record_sampling(model := DeformConv2dPack(2, 3, 3, padding=1, deform_groups=2)) as layers:
        model(torch.zeros(2, 2, 5, 7))
    (layer,) = layers.values()
    assert layer.locations.shape == (2, 2, 9, 5, 7, 2) and layer.grid.shape == (1, 1, 9, 5, 7, 2)
    assert torch.equal(layer.weights, torch.ones(2, 2, 9, 5, 7))


@pytest.mark.parametrize("kind", [DCNv3, DCNv4, MmcvDCNv2])
def test_other_classes_are_recorded_alike(kind: type) -> None:
    with record_sampling(model := kind(4, 4, 3, stride=2, padding=1)) as layers:
        model(torch.zeros(2, 4, 12, 16))
    (layer,) = layers.values()
    assert layer.stride == (2, 2)
    assert layer.locations.shape == (2, 1, 9, 6, 8, 2) and layer.weights.shape == (2, 1, 9, 6, 8)
    points, _ = trace_points([layer], x=4, y=6)
    expected = {(x, y) for x in (3, 4, 5) for y in (5, 6, 7)}
    assert {tuple(point) for point in points.int().tolist()} == expected


def test_points_outside_a_map_end_there() -> None:
    with record_sampling(model := Stack()) as layers:
        model(torch.zeros(1, 1, 64, 48))
    layers = list(layers.values())
    corner, weights = trace_points(layers, x=0, y=0, offsets=False)
    assert corner.shape == (4 * 9, 2) and weights.shape == (36,)
    beyond, _ = trace_points(layers, x=-100, y=-100, offsets=False)
    torch.testing.assert_close(beyond, corner)  # the nearest output


def test_hooks_are_removed_also_after_an_error() -> None:
    model = Stack()
    with pytest.raises(RuntimeError, match="stop"), record_sampling(model) as layers:
        raise RuntimeError("stop")
    model(torch.zeros(1, 1, 64, 48))
    assert layers == {}


@pytest.mark.parametrize("module", [nn.Linear(1, 1), DeformRoIPoolPack(2, 1, head="paper")])
def test_models_without_a_deformable_convolution_are_refused(module: nn.Module) -> None:
    message = f"{type(module).__name__} has no deformable convolution"
    with pytest.raises(ValueError, match=message), record_sampling(module):
        pass


def test_no_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="layers must name at least one"):
        trace_points([], 0, 0)

"""Recorded sampling points are where the layers really read."""

import pytest
import torch
from torch import nn

pytest.importorskip("mmcv.ops")
from mmdeform.analysis.sampling import offsets_to_locations, record_sampling, trace_points
from mmdeform.layers import DeformConv2dPack, DeformRoIPoolPack, ModulatedDeformConv2dPack
from mmdeform.ops import deform_conv2d

GEOMETRY = dict(stride=(2, 1), padding=(1, 0), dilation=(1, 2))


def test_locations_are_where_the_operator_reads() -> None:
    # Two ramps, one channel of x and one of y: what a tap samples of them is its location.
    height, width, kernel, groups = 30, 26, (3, 2), 2
    y, x = torch.meshgrid(
        torch.arange(height).double(), torch.arange(width).double(), indexing="ij"
    )
    ramps = torch.stack([x, y]).repeat(groups, 1, 1)[None]
    taps = kernel[0] * kernel[1]
    plain = nn.functional.conv2d(ramps[:, :1], torch.ones(1, 1, *kernel).double(), **GEOMETRY)
    offset = torch.rand(1, groups * taps * 2, *plain.shape[-2:]).double() * 3 - 1.5
    weight = torch.eye(2 * groups * taps).view(-1, 2 * groups, *kernel).double()
    # Output channel (group, axis, tap) reads one tap of one ramp.
    read = deform_conv2d(ramps, offset, weight, **GEOMETRY)
    read = read.view(groups, 2, taps, *read.shape[-2:]).permute(0, 2, 3, 4, 1)

    locations = offsets_to_locations(offset, kernel, *GEOMETRY.values())
    assert locations.shape == (1, groups, taps, *plain.shape[-2:], 2)
    inside = ((locations >= 0) & (locations <= torch.tensor([width - 1, height - 1]))).all(-1)[0]
    assert inside.float().mean() > 0.7
    torch.testing.assert_close(read[inside], locations[0][inside])


def test_offsets_of_another_kernel_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiple of 2 \* 3 \* 3 channels.*\(1, 8, 4, 4\)"):
        offsets_to_locations(torch.zeros(1, 8, 4, 4), (3, 3), (1, 1), (1, 1), (1, 1))


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
    message = f"{type(module).__name__} has no deformable convolution of mmdeform"
    with pytest.raises(ValueError, match=message), record_sampling(module):
        pass


def test_no_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="layers must name at least one"):
        trace_points([], 0, 0)

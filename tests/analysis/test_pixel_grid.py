"""A map's grid is where its pixels really look, found by gradients."""

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmcv.ops")
from mmdet.models.layers.transformer import PatchMerging

from mmdeform.analysis.recording import GridTracer, PixelGrid, normalized_grid
from mmdeform.layers import DCNv3, ModulatedDeformConv2dPack


class Aside(nn.Module):
    """Calls two layers and passes on what the first one makes of its map."""

    def __init__(self, layer: nn.Module, aside: nn.Module) -> None:
        super().__init__()
        self.layer, self.aside = layer, aside

    def forward(self, x: Tensor) -> Tensor:
        output = self.layer(x)
        self.aside(x)
        return output


class ChannelsLast(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv(kernel: int, stride: int, padding: int, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(1, 1, kernel, stride, padding, dilation, bias=False)


RESNET = [conv(7, 2, 3), nn.MaxPool2d(3, 2, 1), conv(3, 2, 1), conv(1, 2, 0)]
PATCHES = [conv(4, 4, 0), conv(2, 2, 0), conv(2, 2, 0)]
MODELS = {
    "resnet": (RESNET, (16, 16), (0, 0)),
    "patches": (PATCHES, (16, 16), (7.5, 7.5)),
    "average": ([nn.AvgPool2d(3, 3), conv(2, 1, 0), conv(5, 2, 1, 2)], (6, 6), None),
    "sides": ([nn.Conv2d(1, 1, (2, 3), (2, 3), (0, 1), bias=False)], (3, 2), (0, 0.5)),
    "keys": ([PATCHES[0], Aside(nn.Identity(), conv(5, 4, 2)), *PATCHES[1:]], (16, 16), (7.5, 7.5)),
    "shortcut": ([Aside(conv(3, 2, 1), conv(2, 2, 0))], (2, 2), (0, 0)),
    "unequal": ([conv(3, 2, 1), nn.ZeroPad2d((0, 1, 0, 1))], None, None),
}
EVEN = ("keys", "shortcut")  # sizes at which both ways lead to the same one


def seen(model: nn.Module, image: Tensor, row: int, column: int) -> Tensor:
    """Middle (x, y) of the pixels of the image that a pixel of the output depends on."""
    image = image.clone().requires_grad_()
    output = model(image)
    (gradient,) = torch.autograd.grad(output[0, 0, row, column], image)
    y, x = gradient[0, 0].nonzero().unbind(1)
    return torch.stack([x.min() + x.max(), y.min() + y.max()]) / 2


@pytest.mark.parametrize("name", [name for name in MODELS if name != "unequal"])
def test_pixels_lie_at_the_middle_of_what_they_see(name: str) -> None:
    layers, stride, first = MODELS[name]
    model = nn.Sequential(*layers)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    image = torch.ones(1, 1, *((96, 128) if name in EVEN else (101, 122)))
    tracer = GridTracer()
    with tracer.attached(model):
        output = model(image)
    assert tracer.image_size == (image.shape[3], image.shape[2])
    grid = tracer.grid_of((output.shape[3], output.shape[2]))
    assert grid.stride == stride and first in (None, grid.first)
    if not isinstance(layers[1 % len(layers)], nn.MaxPool2d):  # whose gradient picks one pixel
        pixel = torch.tensor([3.0, 2.0])  # far from the border
        assert torch.equal(grid.to_image(pixel), seen(model, image, row=2, column=3))
        assert torch.equal(grid.to_map(grid.to_image(pixel)), pixel)


def test_a_strided_deformable_layer_counts_and_what_is_inside_does_not() -> None:
    class Branch(ModulatedDeformConv2dPack):
        """Reaches the size of its output, and a smaller one, in ways of its own."""

        def forward(self, x: Tensor) -> Tensor:
            self.aside(x)
            return super().forward(x)

    layer = Branch(1, 1, 3, stride=2, padding=1)
    layer.aside = conv(2, 2, 0)
    last = DCNv3(1, 1, 3, stride=2, padding=1, channels_last=True)
    plain = DCNv3(1, 1, 3, stride=2, padding=1)
    model = nn.Sequential(conv(3, 1, 1), layer, plain, ChannelsLast(last))
    tracer = GridTracer()
    with tracer.attached(model):
        output = model(torch.ones(1, 1, 40, 48))
    assert output.shape[2:] == (5, 6)
    assert tracer.grid_of((6, 5)) == PixelGrid((8, 8), (0, 0))


def test_swin_merges_patches() -> None:
    class Merge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = conv(4, 4, 0)
            self.merge = PatchMerging(1, 3)

        def forward(self, x: Tensor) -> Tensor:
            map = self.embed(x)
            tokens, size = self.merge(map.flatten(2).transpose(1, 2), map.shape[2:])
            return tokens.transpose(1, 2).unflatten(2, size)

    model = Merge()
    tracer = GridTracer()
    with tracer.attached(model):
        output = model(torch.randn(1, 1, 32, 64))
    assert output.shape[2:] == (4, 8)
    assert tracer.grid_of((8, 4)) == PixelGrid((8, 8), (3.5, 3.5))


@pytest.mark.parametrize("size", [64, 61, 50])
def test_odd_maps_are_padded_to_patches(size: int) -> None:
    class Patches(nn.Module):
        """As Swin makes them: right and below there may be padding."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([conv(4, 4, 0), conv(2, 2, 0), conv(2, 2, 0)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                step = layer.stride[0]
                x = layer(nn.functional.pad(x, (0, -x.shape[3] % step, 0, -x.shape[2] % step)))
            return x

    model, tracer = Patches(), GridTracer()
    with tracer.attached(model):
        output = model(torch.ones(1, 1, size + 3, size))
    assert tracer.grid_of((output.shape[3], output.shape[2])) == PixelGrid((16, 16), (7.5, 7.5))


def test_other_sizes_cover_the_image() -> None:
    model = nn.Sequential(*MODELS["unequal"][0])
    tracer = GridTracer()
    with tracer.attached(model):
        model(torch.ones(1, 1, 20, 40))
    assert tracer.grid_of((20, 10)) == PixelGrid((2, 2))
    assert tracer.grid_of((21, 11)) == normalized_grid((21, 11), (40, 20))
    edges = normalized_grid((21, 11), (40, 20)).to_image(torch.tensor([[-0.5, -0.5], [20.5, 10.5]]))
    assert torch.allclose(edges, torch.tensor([[-0.5, -0.5], [39.5, 19.5]]))


def test_each_forward_pass_counts_for_itself() -> None:
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ways = nn.ModuleList([conv(2, 2, 0), conv(3, 2, 1)])

        def forward(self, inputs: Tensor, way: int) -> Tensor:
            return self.ways[way](inputs)

    model, tracer = Switch(), GridTracer()
    with tracer.attached(model):
        for way, first in enumerate([(0.5, 0.5), (0.0, 0.0)]):
            model(inputs=torch.ones(1, 1, 8, 8), way=way)
            assert tracer.grid_of((4, 4)).first == first
    model(inputs=torch.ones(1, 1, 16, 16), way=0)
    assert tracer.image_size == (8, 8)  # detached


def test_misuse() -> None:
    tracer, model = GridTracer(), conv(2, 2, 0)
    with pytest.raises(RuntimeError, match="no images were seen"):
        tracer.grid_of((4, 4))
    with tracer.attached(model), pytest.raises(TypeError, match=r"\(N, C, H, W\), got list"):
        model([torch.ones(1, 8, 8)])

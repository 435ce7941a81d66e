"""DCNv3 and DCNv4 in the place of a convolution."""

import copy
import pickle

import pytest
import torch
from mmcv.cnn import ConvModule
from torch import nn

from mmdeform.layers import DCNv3, DCNv4

from .dcn import GEOMETRIES, image, randomise

both = pytest.mark.parametrize("cls", [DCNv3, DCNv4])


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@both
def test_layouts_agree(cls, geometry):
    layer = cls(8, 6, **geometry)
    last = cls(8, 6, channels_last=True, **geometry)
    randomise(layer)
    last.load_state_dict(layer.state_dict(), strict=True)
    x = image(2, 8, 11, 13)
    output = layer(x)
    assert output.shape == nn.Conv2d(8, 6, **geometry)(x).shape
    assert torch.equal(output, last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    in_memory = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(in_memory), output, rtol=1e-4, atol=1e-5)


@both
def test_has_the_attributes_that_conv_module_copies(cls):
    layer, plain = cls(4, 6, 3, stride=2, padding=1), nn.Conv2d(4, 6, 3, stride=2, padding=1)
    for name in (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
        "transposed", "output_padding",
    ):  # fmt: skip
        assert getattr(layer, name) == getattr(plain, name), name


@both
def test_conv_module(cls):
    block = ConvModule(
        16, 8, 3, stride=2, padding=1, conv_cfg=dict(type=f"mmdeform.{cls.__name__}", group=2),
        norm_cfg=dict(type="BN"), act_cfg=dict(type="LeakyReLU"),
    )  # fmt: skip
    assert type(block.conv) is cls
    assert block.conv.group == 2
    assert block.conv.output_proj.bias is None
    block(image(2, 16, 7, 9)).square().sum().backward()
    linears = [module for module in block.conv.modules() if isinstance(module, nn.Linear)]
    assert len(linears) >= 3 and all(linear.weight.grad.any() for linear in linears)
    padded = ConvModule(
        8, 16, 3, padding=1, conv_cfg=dict(type=f"mmdeform.{cls.__name__}"), bias=True,
        padding_mode="reflect",
    )  # fmt: skip
    assert padded(image(2, 8, 5, 5)).shape == (2, 16, 5, 5)
    assert padded.conv.output_proj.bias.shape == (16,)


@pytest.mark.parametrize(
    "channels, arguments, group",
    [
        (64, {}, 4),
        (16, {}, 1),
        (8, {}, 1),
        (64, dict(group=2), 2),
        (64, dict(group_channels=8), 8),
        (12, dict(group=3, group_channels=5), 3),
    ],
)
@both
def test_number_of_groups(cls, channels, arguments, group):
    layer = cls(channels, channels, 3, **arguments)
    assert (layer.group, layer.group_channels) == (group, channels // group)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(groups=2), r"groups must be 1, got 2"),
        (dict(group=5), r"in_channels must be divisible by group, got in_channels=24, group=5"),
        (dict(group=0), r"group=0"),
        ({}, r"divisible by group_channels, got in_channels=24, group_channels=16"),
        (dict(group_channels=0), r"group_channels=0"),
        (dict(group=1, kernel_size=2, remove_center=True), r"odd, square .*, got \(2, 2\)"),
        (dict(group=1, kernel_size=(3, 5), remove_center=True), r"odd, square .*, got \(3, 5\)"),
    ],
)
@both
def test_refuses_arguments(cls, arguments, message):
    with pytest.raises(ValueError, match=f"{cls.__name__}: .*{message}"):
        cls(24, 8, **dict(kernel_size=3) | arguments)


@pytest.mark.parametrize(
    "channels_last, shape, message",
    [
        (False, (2, 5, 5, 8), r"x must have shape \(N, 8, H, W\), got \(2, 5, 5, 8\)"),
        (True, (2, 8, 5, 5), r"x must have shape \(N, H, W, 8\), got \(2, 8, 5, 5\)"),
        (False, (8, 5, 5), r"x .* got \(8, 5, 5\)"),
        (False, (2, 8, 5, 2), r"x of 5 x 2 pixels is smaller than the kernel \(3, 3\)"),
    ],
)
@both
def test_refuses_inputs(cls, channels_last, shape, message):
    layer = cls(8, 8, 3, channels_last=channels_last)
    for call in (layer, layer.predict_offset):
        with pytest.raises(ValueError, match=f"{cls.__name__}: {message}"):
            call(torch.zeros(shape))


@both
def test_empty_batch(cls):
    layer = cls(8, 6, 3, padding=1)
    output = layer(torch.zeros(0, 8, 5, 5))
    assert output.shape == (0, 6, 5, 5)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@both
def test_autocast_on_the_cpu(cls):
    layer = cls(16, 8, 3, padding=1, center_feature_scale=True)
    randomise(layer)
    x = image(2, 16, 7, 8)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    assert (output - exact).abs().mean() < 0.03 * exact.abs().mean()
    output.float().square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@both
def test_other_dtypes(cls, dtype):
    layer = cls(16, 8, 3, padding=1, center_feature_scale=True)
    x = image(1, 16, 6, 6)
    exact = layer(x)
    output = copy.deepcopy(layer).to(dtype)(x.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), exact, rtol=2e-2, atol=2e-2)


def gradients(layer: nn.Module) -> tuple[torch.Tensor, ...]:
    x = image(2, 16, 7, 8).requires_grad_()
    return torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])


@both
def test_gradients_repeat_bit_by_bit(cls):
    layer = cls(16, 8, 3, padding=1)
    randomise(layer)
    for first, second in zip(gradients(layer), gradients(layer), strict=True):
        assert torch.equal(first, second)
        assert first.any()


@both
def test_copies_and_pickles(cls):
    layer = cls(16, 8, 3, padding=1, center_feature_scale=True)
    randomise(layer)
    x = image(2, 16, 5, 6)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), layer(x))


@pytest.mark.parametrize("geometry", [GEOMETRIES[0], GEOMETRIES[6]], ids=str)
@both
def test_compiles_without_graph_breaks(cls, geometry):
    layer = cls(8, 6, center_feature_scale=True, **geometry)
    randomise(layer)
    x = image(2, 8, 9, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


@both
def test_repr_tells_everything(cls):
    text = repr(cls(32, 6, (3, 3), 2, 1, 2, remove_center=True, offset_scale=0.5))
    for part in (
        "32, 6", "kernel_size=(3, 3)", "stride=(2, 2)", "padding=(1, 1)", "dilation=(2, 2)",
        "group=2", "offset_scale=0.5", "remove_center=True",
    ):  # fmt: skip
        assert part in text
    assert "channels_last" not in text

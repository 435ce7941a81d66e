"""Deformable convolution layers against mmcv's, with which they must be interchangeable."""

import copy

import mmcv.ops
import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict as mmengine_load_state_dict
from torch import nn
from torch.nn import functional

from mmdeform import layers

PAIRS = {
    "v1": (layers.DeformConv2dPack, mmcv.ops.DeformConv2dPack),
    "v2": (layers.ModulatedDeformConv2dPack, mmcv.ops.ModulatedDeformConv2dPack),
}
PACKS = {name: ours for name, (ours, _) in PAIRS.items()}
GEOMETRIES = [
    dict(kernel_size=3, padding=1),
    dict(kernel_size=3, padding=1, groups=2, deform_groups=3),
    dict(kernel_size=(3, 2), stride=(2, 1), padding=(1, 0)),
    dict(kernel_size=3, stride=2, padding=2, dilation=2, deform_groups=2),
    dict(kernel_size=1),
]
pairs = pytest.mark.parametrize("ours, theirs", PAIRS.values(), ids=PAIRS)
packs = pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)


def randomise(layer: nn.Module) -> None:
    """Gives every parameter values for which samples fall between pixels and outside the image."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(std=0.3 if name.startswith("conv_offset") else 1.0)


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def assert_same_output_and_gradients(first: nn.Module, second: nn.Module, x: torch.Tensor) -> None:
    results = []
    for layer in (first, second):
        leaf = x.clone().requires_grad_()
        output = layer(leaf)
        weights = torch.linspace(-1, 1, output.numel()).view_as(output)
        grads = torch.autograd.grad((output * weights).sum(), [leaf, *layer.parameters()])
        results.append((output, *grads))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pairs
def test_state_dict_and_results_are_mmcvs(ours, theirs, geometry):
    torch.manual_seed(0)
    layer, other = ours(6, 8, **geometry), theirs(6, 8, **geometry)
    x = image(2, 6, 9, 7)
    randomise(other)
    layer.load_state_dict(other.state_dict(), strict=True)
    assert_same_output_and_gradients(layer, other, x)
    randomise(layer)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert_same_output_and_gradients(layer, other, x)


@pairs
def test_initial_values_are_mmcvs(ours, theirs):
    states = []
    for cls in (ours, theirs):
        torch.manual_seed(7)
        states.append(cls(6, 8, 3, deform_groups=2).state_dict())
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (layers.DeformConv2d, mmcv.ops.DeformConv2d),
        (layers.ModulatedDeformConv2d, mmcv.ops.ModulatedDeformConv2d),
    ],
)
def test_layers_with_given_offsets_are_mmcvs(ours, theirs):
    layer = ours(4, 6, 3, padding=1, deform_groups=2)
    other = theirs(4, 6, 3, padding=1, deform_groups=2)
    other.load_state_dict(layer.state_dict(), strict=True)
    tensors = [image(2, 4, 6, 5), image(2, 36, 6, 5)]
    if ours is layers.ModulatedDeformConv2d:
        tensors.append(image(2, 18, 6, 5).sigmoid())
    torch.testing.assert_close(layer(*tensors), other(*tensors), rtol=1e-4, atol=1e-4)


@packs
def test_runs_without_the_compiled_operators_of_mmcv(pack, monkeypatch):
    monkeypatch.setattr("mmcv.ops.deform_conv.ext_module", None)
    monkeypatch.setattr("mmcv.ops.modulated_deform_conv.ext_module", None)
    layer = pack(4, 4, 3, padding=1)
    layer(image(1, 4, 5, 5)).sum().backward()
    assert layer.weight.grad is not None


class Block(nn.Module):
    def __init__(self, pack: type[nn.Module]) -> None:
        super().__init__()
        self.conv2 = pack(4, 4, 3)


@pytest.mark.parametrize("load", [nn.Module.load_state_dict, mmengine_load_state_dict])
@packs
def test_loads_checkpoints_with_the_old_names_of_the_offset_layer(pack, load):
    source, target = nn.Sequential(Block(pack)), copy.deepcopy(nn.Sequential(Block(pack)))
    randomise(source[0].conv2)
    old = {k.replace(".conv_offset", "_offset"): v for k, v in source.state_dict().items()}
    assert "0.conv2_offset.weight" in old
    load(target, dict(old), strict=True)
    for name, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[name]), name
    with pytest.raises(RuntimeError, match=r"0\.conv2_offset\.weight"):  # new names go first
        load(target, old | source.state_dict(), strict=True)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pack, scale", [*zip(PACKS.values(), (1.0, 0.5), strict=True)], ids=PACKS)
def test_starts_as_the_plain_convolution(pack, scale, bias, geometry):
    layer = pack(6, 8, bias=bias, **geometry)
    if bias:
        nn.init.normal_(layer.bias)
    x = image(2, 6, 9, 7)
    plain = functional.conv2d(
        x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups
    )
    expected = scale * plain + (layer.bias[:, None, None] if bias else 0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@packs
def test_bias_is_a_parameter_only_if_asked_for(pack):
    assert "bias" not in pack(4, 6, 3, bias=False).state_dict()
    layer = pack(4, 6, 3, bias=True)
    assert torch.equal(layer.bias, torch.zeros(6))
    layer(image(1, 4, 5, 5)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((6,), 9.0))


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 5)])
@packs
def test_maps_smaller_than_the_kernel(pack, size):
    layer = pack(4, 6, 3, padding=1)
    x = image(2, 4, *size)
    scale = 0.5 if pack is layers.ModulatedDeformConv2dPack else 1.0
    expected = scale * functional.conv2d(x, layer.weight, padding=1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@packs
def test_im2col_step_is_accepted_and_does_not_divide_the_batch(pack):
    layer = pack(2, 2, 3, padding=1, im2col_step=4)
    randomise(layer)
    x = image(33, 2, 3, 3)
    torch.testing.assert_close(layer(x)[32:], layer(x[32:]), rtol=1e-4, atol=1e-5)
    assert layer(x[:0]).shape == (0, 2, 3, 3)


@packs
def test_accepts_the_former_name_of_deform_groups(pack):
    with pytest.warns(DeprecationWarning, match="deform_groups"):
        assert pack(4, 4, 3, deformable_groups=2).deform_groups == 2


@packs
def test_has_the_attributes_that_conv_module_copies(pack):
    layer, plain = pack(4, 6, 3, stride=2, padding=1), nn.Conv2d(4, 6, 3, stride=2, padding=1)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "transposed"):
        assert getattr(layer, name) == getattr(plain, name), name
    assert layer.groups == 1
    assert layer.output_padding == (0,)


@packs
def test_offset_prediction_is_what_forward_uses(pack):
    layer = pack(4, 6, (3, 2), padding=1, deform_groups=2)
    randomise(layer)
    x = image(2, 4, 5, 6)
    offset, mask = layer.predict_offset(x)
    raw = layer.conv_offset(x)
    assert offset.shape == (2, 24, *raw.shape[2:])
    assert torch.equal(offset, raw[:, :24])  # (dy, dx) pairs, as the convolution gave them
    if pack is layers.ModulatedDeformConv2dPack:
        assert torch.equal(mask, raw[:, 24:].sigmoid())
    else:
        assert mask is None
    moved = copy.deepcopy(layer)
    moved.conv_offset.bias.data[:24] += 100.0  # every sample outside the image
    expected = torch.zeros_like(moved(x))
    if layer.bias is not None:
        expected += layer.bias[:, None, None]
    torch.testing.assert_close(moved(x), expected)


@packs
def test_autocast_on_the_cpu(pack):
    layer = pack(16, 8, 3, padding=1)
    randomise(layer)
    layer.conv_offset.weight.data *= 0.1
    x = image(2, 16, 7, 8)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    assert (output - exact).abs().mean() < 0.02 * exact.abs().mean()
    output.float().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@packs
def test_other_dtypes(pack, dtype):
    layer = pack(16, 8, 3, padding=1)
    x = image(1, 16, 6, 6)
    exact = layer(x)
    output = copy.deepcopy(layer).to(dtype)(x.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), exact, rtol=2e-2, atol=2e-2)


@packs
def test_compiles_without_graph_breaks(pack):
    layer = pack(4, 6, 3, padding=1)
    randomise(layer)
    x = image(2, 4, 5, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


@packs
def test_repr_tells_everything(pack):
    text = repr(pack(4, 6, (3, 2), stride=2, padding=1, dilation=3, groups=2, deform_groups=4))
    for part in ("4, 6", "kernel_size=(3, 2)", "stride=(2, 2)", "padding=(1, 1)"):
        assert part in text
    for part in ("dilation=(3, 3)", "groups=2", "deform_groups=4", "bias=", "(conv_offset)"):
        assert part in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(groups=4), r"in_channels must be divisible by groups, got in_channels=6, groups=4"),
        (dict(groups=3), r"out_channels must be divisible by groups, got out_channels=8, groups=3"),
        (dict(deform_groups=4), r"in_channels must be divisible by deform_groups, .*=6, .*=4"),
        (dict(deform_groups=0), r"deform_groups=0"),
    ],
)
@packs
def test_refuses_groups_that_do_not_divide(pack, arguments, message):
    with pytest.raises(ValueError, match=message):
        pack(6, 8, 3, **arguments)


def test_refuses_inputs_that_contradict_the_layer():
    v1 = layers.DeformConv2d(4, 6, 3, padding=1)
    v2 = layers.ModulatedDeformConv2d(4, 6, 3, padding=1)
    x, offset, mask = image(1, 4, 5, 5), image(1, 18, 5, 5), image(1, 9, 5, 5)
    with pytest.raises(ValueError, match=r"x must have shape \(N, 4, H, W\), got \(1, 8, 5, 5\)"):
        v1(image(1, 8, 5, 5), offset)  # would otherwise be computed in two groups
    with pytest.raises(ValueError, match=r"x must have shape .* got \(4, 5, 5\)"):
        v1(x[0], offset)
    with pytest.raises(ValueError, match=r"offset must have shape \(N, 18, H, W\), got \(1, 36,"):
        v1(x, image(1, 36, 5, 5))  # would otherwise be computed in two deform groups
    with pytest.raises(ValueError, match=r"mask must have shape \(N, 9, H, W\), got \(1, 18,"):
        v2(x, offset, image(1, 18, 5, 5))
    assert v2(x, offset, mask).shape == (1, 6, 5, 5)

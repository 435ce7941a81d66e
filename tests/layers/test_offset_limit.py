"""``offset_range`` and ``offset_clamp`` of every layer that predicts offsets."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from mmdet.models import FPN, ResNet
from torch import Tensor, nn

from mmdeform import layers
from mmdeform.layers.offset_limit import OffsetLimit
from mmdeform.registry import MODELS

# What the options make of an offset, and its derivative.
LIMITS = {
    "offset_range": (
        lambda x, limit: limit * torch.tanh(x / limit),
        lambda x, limit: 1 - torch.tanh(x / limit) ** 2,
    ),
    "offset_clamp": (
        lambda x, limit: x.clamp(-limit, limit),
        lambda x, limit: (x.abs() <= limit).to(x.dtype),
    ),
}
SHAPES = torch.tensor([(5, 6), (3, 4)])
TOKENS = 42


class Case(NamedTuple):
    """A layer and what a test has to know about it."""

    cls: type[nn.Module]
    options: dict[str, Any]
    predictor: str  # the layer inside it that predicts offsets
    # Of the predictor's biases those of offsets; others are masks and padding.
    offset_bias: Callable[[nn.Module, Tensor], Tensor] = lambda layer, bias: bias
    limit: float = 1.5


def of_v4(layer: nn.Module, bias: Tensor) -> Tensor:
    used = bias[: 3 * layer.group * layer.taps]
    return used.view(layer.group, 3 * layer.taps)[:, : 2 * layer.taps]


CONV = dict(in_channels=8, out_channels=8, kernel_size=3, padding=1)
ROI = dict(output_size=(3, 2), output_channels=8, deform_fc_channels=6, spatial_scale=0.5)
ATTENTION = dict(embed_dims=16, num_heads=2, num_levels=2, num_points=3, batch_first=True)
CASES = {
    "v1": Case(layers.DeformConv2dPack, CONV | dict(deform_groups=2), "conv_offset"),
    "v2": Case(
        layers.ModulatedDeformConv2dPack,
        CONV | dict(deform_groups=2),
        "conv_offset",
        lambda layer, bias: bias[:36],
    ),
    "v3": Case(layers.DCNv3, CONV | dict(group=2), "offset"),
    "v4": Case(layers.DCNv4, CONV | dict(group=2), "offset_mask", of_v4),
    "v4-options": Case(
        layers.DCNv4,
        CONV | dict(group=4, remove_center=True, dw_kernel_size=3, offset_scale=0.7),
        "offset_mask",
        of_v4,
    ),
    "pool": Case(layers.DeformRoIPoolPack, ROI, "offset_fc.4"),
    "pool-paper": Case(layers.DeformRoIPoolPack, ROI | dict(head="paper"), "offset_fc"),
    "mpool": Case(layers.ModulatedDeformRoIPoolPack, ROI, "offset_fc.4"),
    "mpool-paper": Case(
        layers.ModulatedDeformRoIPoolPack,
        ROI | dict(head="paper"),
        "offset_fc.4",
        lambda layer, bias: bias[:12],
    ),
    "ps": Case(
        layers.DeformPSRoIPoolPack,
        dict(in_channels=8, output_size=2, spatial_scale=0.5, output_channels=2, num_classes=2),
        "conv_offset",
    ),
    "attention-points": Case(
        layers.MultiScaleDeformableAttention, ATTENTION, "sampling_offsets", limit=3.5
    ),
    "attention-levels": Case(
        layers.SingleLevelDeformableAttention,
        ATTENTION | dict(num_levels=1),
        "sampling_offsets",
        limit=3.5,
    ),
    "attention-boxes": Case(
        layers.MultiScaleDeformableAttention, ATTENTION, "sampling_offsets", limit=3.5
    ),
}
cases = pytest.mark.parametrize("name", CASES)
options = pytest.mark.parametrize("option", LIMITS)


def make(name: str, **limits: float) -> nn.Module:
    """A layer in evaluation mode whose parameters are the same for all limits."""
    torch.manual_seed(0)
    layer = CASES[name].cls(**CASES[name].options, **limits).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


def predictor(name: str, layer: nn.Module) -> nn.Module:
    return layer.get_submodule(CASES[name].predictor)


def inputs(name: str) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    feature_map = torch.randn(2, 8, 12, 13, generator=random)
    rois = torch.tensor([[0, 6.3, 7.1, 14.9, 18.2], [1, 4.0, 4.0, 18.0, 14.0]])
    if name.startswith("attention"):
        size = 4 if name == "attention-boxes" else 2
        references = torch.rand(2, TOKENS, 2, size, generator=random) * 0.4 + 0.3
        return torch.randn(2, TOKENS, 16, generator=random), references
    if name == "ps":
        return feature_map, rois, feature_map
    return (feature_map, rois) if "pool" in name else (feature_map,)


def run(name: str, layer: nn.Module) -> Tensor:
    if name.startswith("attention"):
        query, references = inputs(name)
        return layer(query, reference_points=references, spatial_shapes=SHAPES)
    return layer(*inputs(name))


def predict(name: str, layer: nn.Module) -> Tensor:
    """The offsets of a layer, in the unit of its limits."""
    if name.startswith("attention"):
        query, references = inputs(name)
        locations, _ = layer.predict_sampling(query, references, SHAPES)
        if name == "attention-levels":
            level = torch.tensor([0] * 30 + [1] * 12)
            moved = locations - references[:, range(TOKENS), level][:, :, None, None, None]
            return moved * SHAPES.flip(-1)[level][:, None, None, None]
        moved = locations - references[:, :, None, :, None, :2]
        if name == "attention-points":
            return moved * SHAPES.flip(-1)[:, None]
        return moved / references[:, :, None, :, None, 2:] * 2 * layer.num_points
    if name == "ps":
        _, rois, features = inputs(name)
        return layer.predict_offset(features, rois)
    return layer.predict_offset(*inputs(name))[0]


def test_every_layer_that_predicts_offsets_has_limits():
    predicting = {
        cls
        for cls in vars(layers).values()
        if hasattr(cls, "predict_offset") or hasattr(cls, "predict_sampling")
    }
    assert len(predicting) >= 8
    tested = tuple({case.cls for case in CASES.values()})
    assert all(issubclass(cls, OffsetLimit) and issubclass(cls, tested) for cls in predicting)


@options
@cases
def test_forward_and_gradient_are_those_of_limited_offsets(name, option):
    """Constant offsets, limited by the layer, do what limited ones do without it."""
    case = CASES[name]
    function, derivative = LIMITS[option]
    outputs, gradients = [], []
    for limits in ({option: case.limit}, {}):
        layer = make(name, **limits)
        branch = predictor(name, layer)
        with torch.no_grad():
            branch.weight.zero_()
            branch.bias.normal_(std=5.0)  # masks and padding are not limited
            bias = case.offset_bias(layer, branch.bias)
            raw = torch.linspace(-3 * case.limit, 3 * case.limit, bias.numel()).view(bias.shape)
            bias.copy_(raw if limits else function(raw, case.limit))
        output = run(name, layer)
        weights = torch.linspace(-1, 1, output.numel()).view_as(output)
        (gradient,) = torch.autograd.grad((output * weights).sum(), branch.bias)
        outputs.append(output)
        gradients.append(gradient)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    limited, free = (case.offset_bias(layer, gradient) for gradient in gradients)
    assert free.any()
    torch.testing.assert_close(limited, free * derivative(raw, case.limit), rtol=1e-3, atol=1e-3)


@options
@cases
def test_limit_holds_whatever_the_weights(name, option):
    limit = CASES[name].limit
    layer = make(name, **{option: limit})
    with torch.no_grad():
        predictor(name, layer).weight.normal_(std=100.0)
    offset = predict(name, layer)
    assert 0.99 * limit < offset.abs().max() <= limit * (1 + 1e-5)
    assert run(name, layer).isfinite().all()
    assert predict(name, _without_limits(name, layer)).abs().max() > 2 * limit


def _without_limits(name: str, layer: nn.Module) -> nn.Module:
    other = make(name)
    other.load_state_dict(layer.state_dict(), strict=True)
    return other


@cases
def test_without_options_nothing_changes(name):
    plain, wide = make(name), make(name, offset_clamp=1e30)
    assert plain.offset_range is None and plain.offset_clamp is None
    assert "offset_range" not in repr(plain) and "offset_clamp" not in repr(plain)
    assert list(plain.state_dict()) == list(wide.state_dict())
    assert torch.equal(run(name, plain), run(name, wide))
    offset = torch.randn(3)
    assert plain._limit_offset(offset) is offset


@cases
def test_options_are_attributes_and_printed(name):
    layer = make(name, offset_range=8)
    assert layer.offset_range == 8 and "offset_range=8" in layer.extra_repr()
    layer = make(name, offset_clamp=4.5)
    assert layer.offset_clamp == 4.5 and "offset_clamp=4.5" in layer.extra_repr()


@pytest.mark.parametrize("name", ["v2", "v4-options"])
@options
def test_gradcheck(name, option):
    layer = make(name, **{option: 0.6}).double()
    x = inputs(name)[0][:1, :, :4, :5].double().requires_grad_()
    with torch.no_grad():
        predictor(name, layer).weight.mul_(0.05)
    parameters = list(predictor(name, layer).parameters())
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters), fast_mode=True)


@cases
def test_refuses_what_is_no_limit(name):
    cls = CASES[name].cls.__name__
    for value in (0, -1.0, float("inf"), float("nan"), True, "8"):
        for option in LIMITS:
            with pytest.raises(
                ValueError, match=f"{cls}: {option} must be a positive .* {value!r}"
            ):
                make(name, **{option: value})
    with pytest.raises(ValueError, match=r"offset_range and offset_clamp .* got 8 and 9.5"):
        make(name, offset_range=8, offset_clamp=9.5)


@options
def test_attention_refuses_limits_within_its_first_offsets(option):
    with pytest.raises(ValueError, match=f"{option} must be at least num_points=3, .* got 2.5"):
        make("attention-points", **{option: 2.5})
    layer = layers.MultiScaleDeformableAttention(**ATTENTION, **{option: 3})
    layer.init_weights()
    offset = predict("attention-points", layer).detach()
    reached = 3 if option == "offset_clamp" else 3 * torch.tanh(torch.tensor(1.0)).item()
    assert offset.abs().max().item() == pytest.approx(reached, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    layer = make("v1", offset_range=3)
    small = torch.logspace(-6, -1.5, 200).to(dtype)
    assert torch.equal(layer._limit_offset(small), small)  # no rounding on the way
    huge = torch.tensor([-5e4, 5e4], dtype=dtype)
    for option in LIMITS:
        limited = make("v1", **{option: 3})._limit_offset(huge)
        assert limited.dtype == dtype and limited.tolist() == [-3, 3]


@options
def test_nan_stays_nan(option):
    limited = make("v1", **{option: 3})._limit_offset(torch.tensor([float("nan"), 1.0]))
    assert limited.isnan().tolist() == [True, False]


@options
@pytest.mark.parametrize("name", ["v2", "v4", "mpool", "attention-boxes"])
def test_autocast_and_compile(name, option):
    layer = make(name, **{option: CASES[name].limit})
    expected = run(name, layer)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(name, compiled), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert predict(name, layer).abs().max() <= CASES[name].limit * (1 + 1e-2)
        assert run(name, layer).isfinite().all()


@pytest.mark.parametrize("dcn", ["DCN", "DCNv2", "DCNv3", "DCNv4"])
def test_by_config_in_a_backbone_and_a_neck(dcn):
    backbone = ResNet(
        depth=50,
        base_channels=4,
        stem_channels=4,
        num_stages=2,
        strides=(1, 2),
        dilations=(1, 1),
        out_indices=(1,),
        dcn=dict(type=f"mmdeform.{dcn}", offset_range=8, fallback_on_stride=False),
        stage_with_dcn=(False, True),
    )
    neck = FPN([8, 16], 8, num_outs=2, conv_cfg=dict(type=f"mmdeform.{dcn}", offset_clamp=2.5))
    found = [m for m in backbone.modules() if isinstance(m, OffsetLimit)]
    assert [layer.offset_range for layer in found] == [8] * 4
    found = [m for m in neck.modules() if isinstance(m, OffsetLimit)]
    assert [layer.offset_clamp for layer in found] == [2.5] * 4
    backbone.init_weights()
    assert backbone(torch.randn(1, 3, 32, 32))[0].shape == (1, 32, 4, 4)


def test_by_config_in_a_roi_extractor():
    roi_layer = dict(type="mmdeform.DeformRoIPoolPack", output_size=7, output_channels=8)
    extractor = MODELS.build(
        dict(
            type="mmdeform.SingleRoIExtractor",
            roi_layer=dict(roi_layer, offset_range=5),
            out_channels=8,
            featmap_strides=[4, 8],
        )
    )
    assert [layer.offset_range for layer in extractor.roi_layers] == [5, 5]

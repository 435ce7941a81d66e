"""The layers inside mmdet's backbones and necks: building, initialisation, learning rates."""

import mmcv.ops
import pytest
import torch
from mmcv.cnn import ConvModule
from mmdet.models import FPN, ResNet
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmdeform import layers

TYPES = {
    "mmdeform.DCN": layers.DeformConv2dPack,
    "mmdeform.DCNv2": layers.ModulatedDeformConv2dPack,
}
DEPTHWISE = {"mmdeform.DCNv3": layers.DCNv3, "mmdeform.DCNv4": layers.DCNv4}
types = pytest.mark.parametrize("name, cls", TYPES.items(), ids=TYPES)


def make_resnet(name: str, **kwargs) -> ResNet:
    return ResNet(
        depth=50,
        base_channels=8,
        stem_channels=8,
        dcn=dict(type=name, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
        **kwargs,
    )


def make_fpn(name: str) -> FPN:
    return FPN([8, 16], 8, num_outs=2, conv_cfg=dict(type=name))


def offset_layers(model: nn.Module) -> list[nn.Conv2d]:
    return [m for name, m in model.named_modules() if name.endswith(".conv_offset")]


@types
def test_resnet_offsets_stay_zero_through_init_weights(name, cls):
    model = make_resnet(name, zero_init_residual=False)  # or no gradient reaches the layers
    model.init_weights()
    assert sum(type(m) is cls for m in model.modules()) == 13
    assert len(offset_layers(model)) == 13
    assert not any(p.any() for layer in offset_layers(model) for p in layer.parameters())
    assert model.layer2[0].conv1.weight.any()
    outputs = model(torch.randn(2, 3, 64, 64))
    assert [tuple(o.shape[1:]) for o in outputs] == [
        (32, 16, 16),
        (64, 8, 8),
        (128, 4, 4),
        (256, 2, 2),
    ]
    sum(o.mean() for o in outputs).backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in offset_layers(model))


@types
def test_fpn_offsets_stay_zero_through_init_weights(name, cls):
    model = make_fpn(name)
    model.init_weights()
    assert len(offset_layers(model)) == 4  # lateral and output convolutions of two levels
    assert not any(p.any() for layer in offset_layers(model) for p in layer.parameters())
    assert all(m.weight.any() for m in model.modules() if isinstance(m, cls))
    outputs = model((torch.randn(1, 8, 8, 8), torch.randn(1, 16, 4, 4)))
    assert [tuple(o.shape) for o in outputs] == [(1, 8, 8, 8), (1, 8, 4, 4)]


@pytest.mark.parametrize("name, cls", DEPTHWISE.items(), ids=DEPTHWISE)
def test_resnet_and_fpn_of_depthwise_layers(name, cls):
    backbone, neck = make_resnet(name, zero_init_residual=False), make_fpn(name)
    backbone.init_weights()
    neck.init_weights()
    convs = [m for m in backbone.modules() if isinstance(m, cls)]
    assert len(convs) == 13
    for conv in [*convs, *(m for m in neck.modules() if isinstance(m, cls))]:
        predictors = [m for m in conv.modules() if isinstance(m, layers.OffsetLinear)]
        assert len(predictors) == (2 if cls is layers.DCNv3 else 1)
        assert not any(predictor.weight.any() for predictor in predictors)
    outputs = backbone(torch.randn(2, 3, 64, 64))
    assert [tuple(o.shape[1:]) for o in outputs] == [
        (32, 16, 16),
        (64, 8, 8),
        (128, 4, 4),
        (256, 2, 2),
    ]
    sum(o.mean() for o in outputs).backward()
    for conv in convs:
        linears = [m for m in conv.modules() if isinstance(m, nn.Linear)]
        assert len(linears) >= 3 and all(linear.weight.grad.any() for linear in linears)
    outputs = neck((torch.randn(1, 8, 8, 8), torch.randn(1, 16, 4, 4)))
    assert [tuple(o.shape) for o in outputs] == [(1, 8, 8, 8), (1, 8, 4, 4)]


def test_offsets_of_mmcvs_layer_do_not_stay_zero():
    """The reason for OffsetConv2d and OffsetLinear; if this fails, it can go."""
    model = make_resnet("DCN")
    model.init_weights()
    assert all(layer.weight.any() for layer in offset_layers(model))


@types
def test_dcn_offset_lr_mult_reaches_the_offset_layers(name, cls):
    model = nn.ModuleDict(dict(backbone=make_resnet(name), neck=make_fpn(name)))
    wrapper = build_optim_wrapper(
        model,
        dict(
            type="OptimWrapper",
            optimizer=dict(type="SGD", lr=1.0, weight_decay=0.5),
            paramwise_cfg=dict(dcn_offset_lr_mult=0.1, bias_lr_mult=2.0),
        ),
    )
    rates = {id(p): g["lr"] for g in wrapper.param_groups for p in g["params"]}
    for key, parameter in model.named_parameters():
        if ".conv_offset." in key:
            assert rates[id(parameter)] == pytest.approx(0.1), key
        elif key.endswith(".weight"):
            assert rates[id(parameter)] == 1.0, key
    assert rates[id(model["neck"].fpn_convs[0].conv.bias)] == 2.0


@types
def test_conv_module(name, cls):
    block = ConvModule(
        8, 16, 3, stride=2, padding=1, conv_cfg=dict(type=name, deform_groups=2),
        norm_cfg=dict(type="BN"), act_cfg=dict(type="LeakyReLU"),
    )  # fmt: skip
    assert type(block.conv) is cls
    assert block.conv.bias is None
    assert block(torch.randn(2, 8, 7, 9)).shape == (2, 16, 4, 5)
    padded = ConvModule(
        8, 16, 3, padding=1, conv_cfg=dict(type=name), padding_mode="reflect", bias=True
    )
    assert padded(torch.randn(2, 8, 5, 5)).shape == (2, 16, 5, 5)
    assert padded.conv.bias.shape == (16,)


def test_resnet_loads_a_checkpoint_made_with_mmcvs_layers():
    ours, theirs = make_resnet("mmdeform.DCNv2"), make_resnet("DCNv2")
    ours.eval(), theirs.eval()  # not chained: mmdet's ResNet.train returns None
    for layer in offset_layers(theirs):
        nn.init.normal_(layer.weight, std=0.02)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64)
    for a, b in zip(ours(x), theirs(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_layers_are_those_that_openmmlab_looks_for():
    replaced = [name for name in layers.__all__ if hasattr(mmcv.ops, name)]
    assert len(replaced) == 8
    for name in replaced:
        assert issubclass(getattr(layers, name), getattr(mmcv.ops, name))

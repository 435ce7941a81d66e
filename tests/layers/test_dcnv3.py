"""DCNv3 against the published module's definition, written with grid_sample."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from mmdeform.layers import DCNv3

from .dcn import GEOMETRIES, image, pixels_at, randomise, sample_windows, window_centers


def expected_output(layer: DCNv3, x: torch.Tensor) -> torch.Tensor:
    """(N, H, W, C) to (N, Ho, Wo, O): the depthwise branch at every pixel, read at the windows."""
    conv, (norm, act) = layer.dw_conv[0], layer.dw_conv[1:]
    kernel = conv.kernel_size
    low = [(k - 1) // 2 for k in kernel]
    border = 8  # windows may be centred outside the image
    sides = [s for k, lo in zip(kernel[::-1], low[::-1], strict=True) for s in (lo, k - 1 - lo)]
    padded = functional.pad(x.permute(0, 3, 1, 2), [side + border for side in sides])
    dense = functional.conv2d(padded, conv.weight, conv.bias, groups=conv.groups)
    rows, columns = window_centers(layer, x.shape[1:3])
    features = act(norm(dense[:, :, rows + border][..., columns + border]))
    value = layer.input_proj(x)
    mask = layer.mask(features).unflatten(-1, (layer.group, -1)).softmax(-1)
    output = sample_windows(layer, value, layer.offset(features), mask)
    if layer.center_feature_scale:
        share = features @ layer.center_feature_scale_proj_weight.T
        share = (share + layer.center_feature_scale_proj_bias).sigmoid()
        share = share.repeat_interleave(layer.group_channels, -1)
        output = output * (1 - share) + pixels_at(value, rows, columns) * share
    return layer.output_proj(output)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(center_feature_scale=True, offset_scale=0.7),
        dict(dw_kernel_size=(5, 4)),
        dict(dw_kernel_size=1),
    ],
    ids=str,
)
def test_any_geometry(geometry, options):
    layer = DCNv3(12, 8, group=3, channels_last=True, **geometry, **options)
    randomise(layer)
    x = image(2, 11, 13, 12)
    expected = expected_output(layer, x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    conv = nn.Conv2d(1, 1, **geometry)
    assert layer(x).shape[1:3] == conv(x[..., :1].permute(0, 3, 1, 2)).shape[2:]


@pytest.mark.parametrize("norm_layer", ["LN", "BN"])
@pytest.mark.parametrize("act_layer", ["GELU", "ReLU", "SiLU"])
def test_without_the_middle_tap(act_layer, norm_layer):
    layer = DCNv3(
        12, 12, 3, padding=1, group=3, remove_center=True, act_layer=act_layer,
        norm_layer=norm_layer, channels_last=True,
    )  # fmt: skip
    randomise(layer)
    layer.eval()
    x = image(2, 7, 6, 12)
    torch.testing.assert_close(layer(x), expected_output(layer, x), rtol=1e-4, atol=1e-4)
    assert type(layer.dw_conv[2]) is getattr(nn, act_layer)


PUBLISHED = {
    "dw_conv.0.weight": (64, 1, 5, 5),
    "dw_conv.0.bias": (64,),
    "dw_conv.1.1.weight": (64,),
    "dw_conv.1.1.bias": (64,),
    "offset.weight": (4 * 9 * 2, 64),
    "offset.bias": (4 * 9 * 2,),
    "mask.weight": (4 * 9, 64),
    "mask.bias": (4 * 9,),
    "input_proj.weight": (64, 64),
    "input_proj.bias": (64,),
    "output_proj.weight": (64, 64),
    "output_proj.bias": (64,),
}


def test_state_dict_is_the_published_modules():
    layer = DCNv3(64, 64, 3, padding=1, group=4, dw_kernel_size=5, channels_last=True)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == PUBLISHED
    layer = DCNv3(64, 64, 3, padding=1, group=4, dw_kernel_size=5, center_feature_scale=True)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == PUBLISHED | {
        "center_feature_scale_proj_weight": (4, 64),
        "center_feature_scale_proj_bias": (4,),
    }
    names = set(DCNv3(64, 64, 3, norm_layer="BN").state_dict())
    assert layer.dw_conv[1][1].eps == 1e-6
    assert {"dw_conv.1.0.weight", "dw_conv.1.0.running_mean"} <= names
    assert not any(name.startswith("dw_conv.1.1") for name in names)


def test_starts_as_the_average_between_two_projections():
    layer = DCNv3(16, 8, 3, padding=1)
    for name, parameter in layer.named_parameters():
        if name.startswith(("offset", "mask")) or name.endswith("proj.bias"):
            assert not parameter.any(), name
    bound = (6 / (16 + 8)) ** 0.5  # Xavier, uniform
    assert 0.9 * bound < layer.output_proj.weight.abs().max() <= bound
    x = image(2, 16, 6, 7)
    value = layer.input_proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    mean = functional.avg_pool2d(value, 3, 1, 1)
    expected = layer.output_proj(mean.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_offset_prediction_is_what_forward_uses():
    layer = DCNv3(12, 12, 3, stride=2, padding=1, group=3, offset_scale=0.5)
    randomise(layer)
    x = image(2, 12, 7, 6)
    offset, mask = layer.predict_offset(x)
    assert offset.shape == (2, 4, 3, 3 * 9 * 2) and mask.shape == (2, 4, 3, 3 * 9)
    torch.testing.assert_close(mask.unflatten(-1, (3, 9)).sum(-1), torch.ones(2, 4, 3, 3))
    value = layer.input_proj(x.permute(0, 2, 3, 1))
    expected = layer.output_proj(sample_windows(layer, value, offset, mask)).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("argument", ["act_layer", "norm_layer"])
def test_refuses_unknown_names(argument):
    with pytest.raises(ValueError, match=rf"{argument} must be one of \(.*\), got 'Nope'"):
        DCNv3(4, 4, 3, **{argument: "Nope"})

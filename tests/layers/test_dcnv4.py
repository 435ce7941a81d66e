"""DCNv4 against the published module's definition, written with grid_sample."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from mmdeform.layers import DCNv4

from .dcn import GEOMETRIES, image, pixels_at, randomise, sample_windows, window_centers


def expected_output(layer: DCNv4, x: torch.Tensor) -> torch.Tensor:
    """(N, H, W, C) to (N, Ho, Wo, O): the offset branch at every pixel, read at the windows."""
    border = 8  # windows may be centred outside the image
    padded = functional.pad(x, (0, 0, *[border] * 4))
    if layer.dw_kernel_size is not None:
        kernel, conv = layer.dw_kernel_size, layer.offset_mask_dw
        low = [(k - 1) // 2 for k in kernel]
        sides = [s for k, lo in zip(kernel[::-1], low[::-1], strict=True) for s in (lo, k - 1 - lo)]
        padded = functional.pad(padded.permute(0, 3, 1, 2), sides)
        padded = functional.conv2d(padded, conv.weight, conv.bias, groups=conv.groups)
        padded = padded.permute(0, 2, 3, 1)
    rows, columns = window_centers(layer, x.shape[1:3])
    raw = layer.offset_mask(padded[:, rows + border][:, :, columns + border])
    parts = raw[..., : 3 * layer.group * layer.taps].unflatten(-1, (layer.group, -1))
    offset, mask = parts[..., : 2 * layer.taps], parts[..., 2 * layer.taps :]
    value = x if layer.without_pointwise else layer.value_proj(x)
    output = sample_windows(layer, value, offset.flatten(3), mask.flatten(3))
    if layer.center_feature_scale:
        share = output @ layer.center_feature_scale_proj_weight.T
        share = (share + layer.center_feature_scale_proj_bias).sigmoid()
        share = share.repeat_interleave(layer.group_channels, -1)
        output = output * (1 - share) + pixels_at(value, rows, columns) * share
    return output if layer.without_pointwise else layer.output_proj(output)


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
    layer = DCNv4(12, 8, group=3, channels_last=True, **geometry, **options)
    randomise(layer)
    x = image(2, 11, 13, 12)
    torch.testing.assert_close(layer(x), expected_output(layer, x), rtol=1e-4, atol=1e-4)
    conv = nn.Conv2d(1, 1, **geometry)
    assert layer(x).shape[1:3] == conv(x[..., :1].permute(0, 3, 1, 2)).shape[2:]


@pytest.mark.parametrize("options", [dict(remove_center=True), dict(without_pointwise=True)])
def test_options(options):
    layer = DCNv4(12, 12, 3, padding=1, group=3, channels_last=True, **options)
    randomise(layer)
    x = image(2, 7, 6, 12)
    torch.testing.assert_close(layer(x), expected_output(layer, x), rtol=1e-4, atol=1e-4)


PUBLISHED = {
    "offset_mask.weight": (112, 64),  # 4 groups * 9 taps * 3, up to a multiple of 8
    "offset_mask.bias": (112,),
    "value_proj.weight": (64, 64),
    "value_proj.bias": (64,),
    "output_proj.weight": (64, 64),
    "output_proj.bias": (64,),
}


@pytest.mark.parametrize(
    "options, added, removed",
    [
        ({}, {}, []),
        (
            dict(dw_kernel_size=5),
            {"offset_mask_dw.weight": (64, 1, 5, 5), "offset_mask_dw.bias": (64,)},
            [],
        ),
        (
            dict(center_feature_scale=True),
            {
                "center_feature_scale_proj_weight": (4, 64),
                "center_feature_scale_proj_bias": (4,),
            },
            [],
        ),
        (dict(bias=False), {}, ["output_proj.bias"]),
        (
            dict(without_pointwise=True),
            {},
            ["value_proj.weight", "value_proj.bias", "output_proj.weight", "output_proj.bias"],
        ),
        (
            dict(remove_center=True),
            {"offset_mask.weight": (96, 64), "offset_mask.bias": (96,)},
            [],
        ),
    ],
    ids=str,
)
def test_state_dict_is_the_published_modules(options, added, removed):
    layer = DCNv4(64, 64, 3, padding=1, group=4, channels_last=True, **options)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    expected = {name: shape for name, shape in PUBLISHED.items() if name not in removed}
    assert shapes == expected | added


def test_starts_as_published_with_channels_last():
    layer = DCNv4(16, 8, 3, padding=1, channels_last=True)
    assert not layer.offset_mask.weight.any() and not layer.offset_mask.bias.any()
    assert not layer.value_proj.bias.any() and not layer.output_proj.bias.any()
    bound = (6 / (16 + 8)) ** 0.5  # Xavier, uniform
    assert 0.9 * bound < layer.output_proj.weight.abs().max() <= bound
    assert not layer(image(2, 6, 7, 16)).any()


def test_starts_as_the_average_as_a_convolution():
    layer = DCNv4(32, 8, 3, padding=1, group=2)
    x = image(2, 32, 6, 7)
    value = layer.value_proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    mean = functional.avg_pool2d(value, 3, 1, 1)
    expected = layer.output_proj(mean.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert not layer.offset_mask.weight.any()
    assert not layer.offset_mask.bias[3 * 2 * 9 :].any()


def test_learns_between_normalisation_and_relu():
    """As published it does not: no gradient passes through zeros."""
    for zero in (False, True):
        layer = DCNv4(16, 16, 3, padding=1, bias=False)
        if zero:
            nn.init.zeros_(layer.offset_mask.bias)
        block = nn.Sequential(layer, nn.BatchNorm2d(16), nn.ReLU())
        (block(image(2, 16, 6, 7)) * image(2, 16, 6, 7)).sum().backward()
        assert all(bool(p.grad.any()) != zero for p in layer.parameters())


def test_offset_prediction_is_what_forward_uses():
    layer = DCNv4(12, 12, 3, stride=2, padding=1, group=3, offset_scale=0.5)
    randomise(layer)
    x = image(2, 12, 7, 6)
    offset, mask = layer.predict_offset(x)
    assert offset.shape == (2, 4, 3, 3 * 9 * 2) and mask.shape == (2, 4, 3, 3 * 9)
    value = layer.value_proj(x.permute(0, 2, 3, 1))
    expected = layer.output_proj(sample_windows(layer, value, offset, mask)).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_refuses_other_output_channels_without_projections():
    with pytest.raises(ValueError, match=r"without_pointwise needs .*, got 16 and 8"):
        DCNv4(16, 8, 3, without_pointwise=True)

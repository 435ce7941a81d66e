"""Position-sensitive pooling layers and the offset branch of R-FCN."""

import copy
import pickle

import pytest
import torch

from mmdeform.layers import DeformPSRoIPool, DeformPSRoIPoolPack
from mmdeform.ops import deform_ps_roi_pool

CONFIG = dict(output_size=3, spatial_scale=0.5, output_channels=4)


def tensors(cells: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score maps, RoIs and features."""
    random = torch.Generator().manual_seed(0)
    rois = torch.tensor([[0, 1.3, 2.1, 12.9, 14.2], [1, 0.0, 0.0, 21.0, 17.0]])
    scores = torch.randn(2, 4 * cells**2, 9, 11, generator=random)
    return scores, rois, torch.randn(2, 5, 9, 11, generator=random)


def make_pack(**changes) -> DeformPSRoIPoolPack:
    layer = DeformPSRoIPoolPack(**dict(CONFIG, in_channels=5) | changes)
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.5)
    torch.nn.init.normal_(layer.conv_offset.bias, std=0.5)
    return layer


def test_passes_its_arguments_on():
    scores, rois, _ = tensors(cells=2)
    offset = torch.randn(2, 4, 5, 5)
    layer = DeformPSRoIPool((2, 3), 0.5, 4, 2, 5, sample_per_part=3, trans_std=0.2)
    expected = deform_ps_roi_pool(scores, rois, offset, (2, 3), 0.5, 4, 2, 5, 3, 0.2)
    assert torch.equal(layer(scores, rois, offset), expected)
    plain = deform_ps_roi_pool(scores, rois, None, (2, 3), 0.5, 4, 2, 5, 3, 0.2)
    assert torch.equal(layer(scores, rois), plain)
    assert not torch.allclose(plain, expected, atol=0.1)


def test_each_bin_reads_its_own_channels():
    layer = DeformPSRoIPool(2, 1.0, 3)
    assert (layer.group_size, layer.part_size) == (2, 2)
    scores = torch.arange(12.0)[None, :, None, None].expand(1, 12, 8, 8)
    pooled = layer(scores, torch.tensor([[0, 1.0, 1.0, 5.0, 5.0]]))
    assert torch.equal(pooled, torch.arange(12.0).view(1, 3, 2, 2))


@pytest.mark.parametrize("num_classes", [1, 2, 4])
@pytest.mark.parametrize("part_size", [None, 2])
def test_offsets_are_pooled_maps_of_a_convolution(part_size, num_classes):
    scores, rois, features = tensors()
    layer = make_pack(num_classes=num_classes, part_size=part_size, sample_per_part=3)
    parts = part_size or 3
    offset = layer.predict_offset(features, rois)
    assert offset.shape == (2, 2 * num_classes, parts, parts)
    maps = layer.conv_offset(features)  # channels: class, (x, y), cell
    pool = DeformPSRoIPool(parts, 0.5, 2 * num_classes, sample_per_part=3)
    torch.testing.assert_close(offset, pool(maps, rois))
    plain = DeformPSRoIPool(**CONFIG, part_size=part_size, sample_per_part=3)
    assert torch.equal(layer(scores, rois, features), plain(scores, rois, offset))


def test_a_class_moves_its_own_channels_only():
    scores, rois, features = tensors()
    layer = make_pack(num_classes=2)
    torch.nn.init.zeros_(layer.conv_offset.weight)
    layer.conv_offset.bias.data[:18] = 0  # the first class
    plain = DeformPSRoIPool(**CONFIG)(scores, rois)
    moved = layer(scores, rois, features)
    torch.testing.assert_close(moved[:, :2], plain[:, :2])
    assert (moved[:, 2:] - plain[:, 2:]).abs().mean() > 0.05


def test_starts_without_offsets():
    scores, rois, features = tensors()
    layer = DeformPSRoIPoolPack(5, **CONFIG)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "conv_offset.weight": (18, 5, 1, 1),
        "conv_offset.bias": (18,),
    }
    assert not any(parameter.any() for parameter in layer.parameters())
    expected = DeformPSRoIPool(**CONFIG)(scores, rois)
    torch.testing.assert_close(layer(scores, rois, features), expected)
    layer(scores, rois, features).square().sum().backward()
    assert layer.conv_offset.weight.grad.any()


def test_no_rois_keep_the_graph():
    scores, rois, features = tensors()
    leaves = [scores.requires_grad_(), features.requires_grad_()]
    layer = make_pack()
    output = layer(scores, rois[:0], features)
    assert output.shape == (0, 4, 3, 3)
    output.sum().backward()
    for tensor in [*leaves, *layer.parameters()]:
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_autocast_on_the_cpu():
    scores, rois, features = tensors()
    layer = make_pack()
    exact = layer(scores, rois, features)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(scores, rois, features)
    assert output.dtype == torch.bfloat16
    assert (output - exact).abs().mean() < 0.05 * exact.abs().mean()
    output.float().square().sum().backward()
    assert layer.conv_offset.weight.grad.dtype == torch.float32
    assert layer.conv_offset.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    scores, rois, features = tensors()
    layer = make_pack()
    exact = layer(scores, rois, features)
    output = layer.to(dtype)(scores.to(dtype), rois, features.to(dtype))
    assert output.dtype == dtype
    assert (output - exact).abs().mean() < 0.03 * exact.abs().mean()


def test_gradients_repeat_bit_by_bit():
    scores, rois, features = tensors()
    layer = make_pack()
    scores.requires_grad_()

    def gradients() -> tuple[torch.Tensor, ...]:
        output = layer(scores, rois, features)
        return torch.autograd.grad(output.square().sum(), [scores, *layer.parameters()])

    for first, second in zip(gradients(), gradients(), strict=True):
        assert torch.equal(first, second)
        assert first.any()


def test_copies_and_pickles():
    layer = make_pack()
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(*tensors()), layer(*tensors()))


def test_compiles_without_graph_breaks():
    layer = make_pack(num_classes=2)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors()), layer(*tensors()))


def test_repr_tells_everything():
    text = repr(make_pack(num_classes=2, trans_std=0.3))
    for part in (
        "output_size=(3, 3)", "spatial_scale=0.5", "output_channels=4", "group_size=3",
        "part_size=3", "sample_per_part=4", "trans_std=0.3", "num_classes=2", "(conv_offset)",
    ):  # fmt: skip
        assert part in text


@pytest.mark.parametrize("name", ["group_size", "part_size"])
def test_refuses_to_guess_sizes_of_oblong_outputs(name):
    sizes = dict(group_size=2, part_size=2) | {name: None}
    with pytest.raises(ValueError, match=rf"{name} must be given .*output_size=\(2, 3\)"):
        DeformPSRoIPool((2, 3), 0.5, 4, **sizes)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_refuses_classes_that_do_not_divide(num_classes):
    with pytest.raises(ValueError, match=rf"output_channels=4, num_classes={num_classes}"):
        make_pack(num_classes=num_classes)

"""Spatial support tells the truth about networks of which it is known, and leaves them alone."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mmcv.ops
import pytest
import torch
from torch import Tensor, nn

from mmdeform.analysis.recording import record
from mmdeform.analysis.support import (
    effective_receptive_field,
    effective_sampling,
    feature_node,
    output_gradients,
    saliency_region,
)
from mmdeform.analysis.support.nodes import Node
from mmdeform.layers import (
    DCNv3,
    DCNv4,
    DeformableAttention2d,
    DeformConv2d,
    DeformConv2dPack,
    DeformPSRoIPoolPack,
    DeformRoIPoolPack,
    ModulatedDeformConv2dPack,
    ModulatedDeformRoIPoolPack,
    MultiScaleDeformableAttention,
    SingleLevelDeformableAttention,
)
from mmdeform.layers.predictors import predictors
from mmdeform.layers.sampling import call_arguments, sampling_of


def plain_network() -> nn.Sequential:
    """Kernels 3, 3 and 5 with strides 2, 1 and 2: a field of 3 + 2 * 2 + 2 * 4 = 15 pixels."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 5, 5, stride=2, padding=2),
    ).double()


def test_the_receptive_field_of_convolutions() -> None:
    """Exactly the theoretical one, and there the norms of the Jacobian."""
    model = plain_network().eval()
    images = torch.randn(1, 3, 40, 48).double()
    node = feature_node(model, images, "2", x=21, y=18)
    assert node.name == "pixel (5, 4) of 2" and node.position == (20, 16)
    field = effective_receptive_field(node, images)
    expected = torch.zeros(40, 48, dtype=torch.bool)
    expected[16 - 7 : 16 + 8, 20 - 7 : 20 + 8] = True
    assert torch.equal(field > 0, expected)

    jacobian = torch.autograd.functional.jacobian(lambda images: model(images)[0, :, 4, 5], images)
    torch.testing.assert_close(field, jacobian.square().sum((0, 1, 2)).sqrt())
    torch.testing.assert_close(output_gradients(node, images), jacobian[:, 0].norm(dim=1))


def test_projections_estimate_the_sum_over_channels() -> None:
    model = nn.Conv2d(3, 600, 3, padding=1).double().eval()
    node = Node("all", model, lambda images: model(images)[:, :, 5, 5], (5, 5))
    images = torch.randn(1, 3, 12, 12).double()
    exact = effective_receptive_field(node, images, projections=600)
    steps: list[tuple[int, int]] = []
    estimate = effective_receptive_field(
        node, images, projections=64, progress=lambda *step: steps.append(step)
    )
    assert steps == [(step, 64) for step in range(1, 65)]
    assert torch.equal(estimate > 0, exact > 0)
    # The squares of 3 channels by 64 projections: a standard deviation of 7% of the norm.
    inside = exact > 0
    assert (estimate[inside] / exact[inside] - 1).abs().max() < 0.25
    assert not torch.equal(estimate, exact)
    again = effective_receptive_field(node, images, projections=64)
    assert torch.equal(estimate, again)


def test_the_field_moves_with_the_image() -> None:
    """An image moved by the stride has its field moved by the stride, deformed or not."""
    model = nn.Sequential(plain_network(), ModulatedDeformConv2dPack(5, 6, 3, padding=1)).double()
    nn.init.normal_(model[1].conv_offset.weight, std=0.3)
    model.eval()
    images = torch.zeros(1, 3, 96, 96).double()
    images[:, :, 24:72, 24:72] = torch.randn(1, 3, 48, 48).double()
    moved = images.roll((4, 8), (2, 3))
    field, its_field = (
        effective_receptive_field(feature_node(model, image, "1", x, y), image)
        for image, x, y in ((images, 44, 48), (moved, 52, 52))
    )
    torch.testing.assert_close(its_field, field.roll((4, 8), (0, 1)))
    assert 0 < int((field > 0).sum()) < 60 * 60


class Pieces(nn.Module):
    """A map of an image, and a deformable layer on it with whatever the layer needs."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 2, stride=2)
        self.layer, self.call = layer, call

    def forward(self, inputs: Tensor) -> Tensor:
        return self.call(self.layer, self.stem(inputs))


def attend(layer: nn.Module, map: Tensor) -> Tensor:
    """Two levels, 8 x 6 and 4 x 3 pixels; queries are a box and a point, or the pixels."""
    shapes = torch.tensor([[6, 8], [3, 4]])
    tokens = [map.flatten(2), nn.functional.avg_pool2d(map, 2).flatten(2)]
    value = torch.cat(tokens, -1).permute(2, 0, 1)
    if isinstance(layer, SingleLevelDeformableAttention):
        query = value
        points = torch.rand(1, len(query), 2, 2, generator=torch.Generator().manual_seed(2)).to(map)
    else:
        query = value[3:5]
        boxes = [[0.42, 0.55, 0.4, 0.3], [0.61, 0.33, 0.5, 0.6]]
        points = map.new_tensor(boxes)[None, :, None].expand(-1, -1, 2, -1)
    return layer(
        query, value=value, reference_points=points, spatial_shapes=shapes,
        level_start_index=torch.tensor([0, 48]),
    ).permute(1, 2, 0)[..., None]  # fmt: skip


ROIS = torch.tensor([[0, 1.3, 2.1, 13.2, 10.4], [0, 3.0, 1.0, 9.5, 8.5]])


def pool(layer: nn.Module, map: Tensor) -> Tensor:
    return layer(map, ROIS.to(map))


def pool_scores(layer: nn.Module, map: Tensor) -> Tensor:
    return layer(torch.cat([map] * 2, 1), ROIS.to(map), map)


def convolve(layer: nn.Module, map: Tensor) -> Tensor:
    return layer(map)


def with_offsets(layer: nn.Module, map: Tensor) -> Tensor:
    """Offsets that depend on nothing, which two layers could share."""
    generator = torch.Generator().manual_seed(4)
    return layer(map, torch.rand(1, 18, 6, 8, generator=generator).to(map) * 0.6 + 0.1)


ROI = dict(output_size=(3, 2), output_channels=4, spatial_scale=0.5, sampling_ratio=1, gamma=0.3)
ATTENTION = dict(embed_dims=4, num_heads=2, num_points=2, dropout=0.0)
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable]] = {
    "v1": (lambda: DeformConv2dPack(4, 3, 3, padding=1, deform_groups=2), convolve),
    "v1 limited": (lambda: DeformConv2dPack(4, 3, 3, padding=1, offset_clamp=0.2), convolve),
    "v2": (lambda: ModulatedDeformConv2dPack(4, 3, (1, 3), stride=2, offset_range=4), convolve),
    "offsets": (lambda: DeformConv2d(4, 3, 3, padding=1), with_offsets),
    "mmcv v1": (lambda: mmcv.ops.DeformConv2dPack(4, 3, 3, padding=1), convolve),
    "mmcv v2": (lambda: mmcv.ops.ModulatedDeformConv2dPack(4, 3, 3, padding=1), convolve),
    "v3": (lambda: DCNv3(4, 3, 3, padding=1, group=2, offset_scale=1.5), convolve),
    "v4": (lambda: DCNv4(4, 3, 3, padding=1, group=2, offset_scale=0.5), convolve),
    "attention": (lambda: MultiScaleDeformableAttention(num_levels=2, **ATTENTION), attend),
    "mmcv attention": (
        lambda: mmcv.ops.MultiScaleDeformableAttention(num_levels=2, **ATTENTION), attend
    ),
    "single level": (lambda: SingleLevelDeformableAttention(num_levels=1, **ATTENTION), attend),
    "keys": (
        lambda: DeformableAttention2d(4, 2, num_groups=2, stride=2, position_bias=None), convolve
    ),
    "keys, written out": (
        lambda: DeformableAttention2d(
            4, 2, num_groups=2, stride=2, position_bias=None, backend="reference"
        ),
        convolve,
    ),
    "RoI v1": (lambda: DeformRoIPoolPack(deform_fc_channels=6, **ROI), pool),
    "RoI v2": (lambda: ModulatedDeformRoIPoolPack(deform_fc_channels=6, **ROI), pool),
    "PS RoI": (
        lambda: DeformPSRoIPoolPack(
            output_size=2, spatial_scale=0.5, output_channels=2, in_channels=4, sample_per_part=1
        ),
        pool_scores,
    ),
}  # fmt: skip


def make(name: str) -> Pieces:
    layer, call = LAYERS[name]
    model = Pieces(layer(), call)
    generator = torch.Generator().manual_seed(7)
    for predictor in predictors(model.layer):
        for parameter in predictor.module.parameters():
            noise = torch.rand(parameter.shape, generator=generator) - 0.5
            parameter.data.add_(noise, alpha=0.3)
    return model.double().eval()


def first_output(model: Pieces) -> Node:
    """All numbers of the first output pixel or token of the layer, or of the first RoI."""
    return Node(
        "first", model, lambda images: model(images)[:1].flatten(2)[..., :3].flatten(1), (0, 0)
    )


@contextmanager
def changed_offsets(model: Pieces, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Sends through ``change`` what the layer predicts its offsets with, or gets as offsets."""
    layer, handle = model.layer, None
    chosen = [predictor for predictor in predictors(layer) if predictor.is_offset.any()]
    if isinstance(layer, DeformPSRoIPoolPack):  # what it predicts is pooled before it moves a bin
        predict = layer.predict_offset
        layer.predict_offset = lambda *args: change(predict(*args))
    elif chosen:
        handle = chosen[0].module.register_forward_hook(lambda _, args, output: change(output))
    else:
        handle = layer.register_forward_pre_hook(lambda _, args: (args[0], change(args[1])))
    try:
        yield
    finally:
        vars(layer).pop("predict_offset", None)
        if handle:
            handle.remove()


def coordinates(model: Pieces, images: Tensor) -> Tensor:
    """Which coordinate of its locations each offset moves, int64; -1: none, as those of masks."""
    seen: list[Tensor] = []
    found: list[Tensor] = []

    def watch(offsets: Tensor) -> Tensor:
        seen.append(offsets.detach().clone().requires_grad_())
        return seen[-1]

    def ask(layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        seen.clear()
        arguments = call_arguments(layer, args, kwargs)
        if len(predictors(layer)) == 0:
            arguments["offset"] = watch(arguments["offset"])
        locations = sampling_of(layer, **arguments).locations
        numbers = torch.arange(locations.numel(), dtype=locations.dtype).view(locations.shape)
        total, weighted = (
            torch.autograd.grad(sum, seen[0], retain_graph=True)[0]
            for sum in (locations.sum(), (locations * numbers).sum())
        )
        found.append(torch.where(total != 0, weighted / total, -1).round().long())

    with changed_offsets(model, watch):
        handle = model.layer.register_forward_hook(ask, with_kwargs=True)
        model(images)
        handle.remove()
    return found[0]


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_locations_are_finite_differences(name: str) -> None:
    """The response to an offset that is moved, by how far the sample moves in the image."""
    model = make(name)
    images = torch.randn(1, 2, 12, 16).double()
    node = first_output(model)
    (found,) = effective_sampling(node, images, projections=1000)
    norms = found.norms.flatten()
    assert found.call.name == "layer" and found.norms.shape == found.call.locations.shape[:-1]
    which = coordinates(model, images)

    def moved(entry: int, step: float) -> tuple[Tensor, Tensor]:
        def change(offsets: Tensor) -> Tensor:
            if offsets.shape != which.shape:  # another level
                return offsets
            nudge = torch.zeros(offsets.numel()).to(offsets)
            nudge[entry] = step
            return offsets + nudge.view(offsets.shape)

        with changed_offsets(model, change), record(model) as recording:
            response = node.respond(images)[0].detach()
        return response, recording["layer"].locations.flatten()

    order = norms.argsort(descending=True).tolist()
    movable = [sample for sample in order if ((which // 2 == sample) & (which >= 0)).sum() == 2]
    assert norms[movable[2]] > 1e-3
    for sample in [*movable[:3], movable[-1]]:
        squares = 0.0
        for axis in (0, 1):
            (entry,) = (which.flatten() == 2 * sample + axis).nonzero()[:, 0].tolist()
            (low, before), (high, after) = moved(entry, -1e-6), moved(entry, 1e-6)
            distances = after - before
            assert distances.nonzero()[:, 0].tolist() == [2 * sample + axis]
            squares += float(((high - low) / distances[2 * sample + axis]).square().sum())
        assert squares**0.5 == pytest.approx(float(norms[sample]), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("zero", [True, False])
def test_a_limit_does_not_hide_gradients(zero: bool) -> None:
    """Offsets that are cut off, and those of a fresh layer, have the gradients of plain offsets."""
    plain = make("v1 limited")
    plain.layer.offset_clamp = None
    bias = 0.0 if zero else 0.2
    nn.init.zeros_(plain.layer.conv_offset.weight)
    nn.init.constant_(plain.layer.conv_offset.bias, bias)
    limited = copy.deepcopy(plain)
    limited.layer.offset_clamp = 0.2
    nn.init.constant_(limited.layer.conv_offset.bias, 7 * bias)
    images = torch.randn(1, 2, 12, 16).double()
    (one,), (other,) = (
        effective_sampling(first_output(model), images) for model in (plain, limited)
    )
    assert torch.equal(one.call.locations, other.call.locations)
    assert torch.equal(one.norms, other.norms) and one.norms.max() > 0.01


class Stack(nn.Module):
    """Three deformable convolutions, the first two of which share offsets, and a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Conv2d(2, 18, 3, padding=1)
        self.first, self.second = (DeformConv2d(2, 2, 3, padding=1) for _ in range(2))
        self.third = ModulatedDeformConv2dPack(2, 3, 3, padding=1)
        self.branch = ModulatedDeformConv2dPack(2, 3, 3, padding=1)
        self.dropout, self.norm = nn.Dropout(), nn.BatchNorm2d(3)
        self.with_cp = True
        nn.init.normal_(self.third.conv_offset.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        assert not self.with_cp or not inputs.requires_grad
        offset = self.offset(inputs)
        map = self.second(self.first(inputs, offset), offset)
        self.branch(map)
        return self.norm(self.dropout(self.third(map)))


def test_stacked_layers() -> None:
    """Each layer has the gradients of its own samples; other branches, and nothing behind, none."""
    model = Stack().double().eval()
    images = torch.randn(1, 2, 12, 12).double()
    node = feature_node(model, images, "norm", 6, 5)
    layers = effective_sampling(node, images)
    assert [layer.call.name for layer in layers] == ["first", "second", "third"]
    used = [(layer.norms[0, 0] > 0).any(0) for layer in layers]  # (Ho, Wo)
    assert used[2].nonzero().tolist() == [[5, 6]]
    # Of the second layer what the third one reads: pixels next to its samples.
    samples = layers[2].call.samples(5 * 12 + 6).points
    y, x = used[1].nonzero().double().unbind(1)
    far = (torch.stack([x, y], 1)[:, None] - samples).abs().amax(-1).amin(1)
    # Its own offset convolution reads the 3 x 3 pixels around it.
    window = ((x - 6).abs() <= 1) & ((y - 5).abs() <= 1)
    assert ((far < 1) | window).all() and 9 < len(x) < 60
    assert used[1].sum() < used[0].sum()
    (only,) = effective_sampling(node, images, layers="second")
    torch.testing.assert_close(only.norms, layers[1].norms)
    # The first layer's own, although the second one has the same offsets.
    for index, name in enumerate(("first", "second")):
        other = copy.deepcopy(model)
        shared = other.offset(images).detach()
        layer = getattr(other, name)
        private = shared.clone().requires_grad_()
        layer.register_forward_pre_hook(lambda _, args, private=private: (args[0], private))
        response = feature_node(other, images, "norm", 6, 5).respond(images)[0]
        squares = sum(
            torch.autograd.grad(each, private, retain_graph=True)[0].square() for each in response
        )
        expected = squares.unflatten(1, (9, 2)).sum(2)[:, None].sqrt()
        torch.testing.assert_close(layers[index].norms, expected)


def state(model: nn.Module, images: Tensor) -> list:
    with torch.no_grad():
        output = model(images)
    return [
        output,
        torch.get_rng_state(),
        *model.state_dict().values(),
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
        [module.training for module in model.modules()],
        model.with_cp,
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        images.requires_grad,
        torch.is_grad_enabled(),
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_stays_as_it_is(fails: bool) -> None:
    model = Stack().eval()
    model.first.weight.requires_grad_(False)
    model.third.weight.grad = torch.ones_like(model.third.weight)
    images = torch.randn(1, 2, 16, 16)
    before = copy.deepcopy(state(model, images))
    node = feature_node(model, images, "norm", 6, 5)
    analyses = (
        lambda node: effective_receptive_field(node, images),
        lambda node: effective_sampling(node, images),
        lambda node: saliency_region(node, images, cell=4, passes=30),
    )
    for analysis in analyses:
        if fails:

            def broken(images: Tensor) -> Tensor:
                raise ZeroDivisionError(node.respond(images))

            with pytest.raises(ZeroDivisionError):
                analysis(Node("broken", model, broken, (0, 0)))
        else:
            analysis(node)
    for old, new in zip(before, state(model, images), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0) if isinstance(old, Tensor) else None
        assert isinstance(old, Tensor) or str(new) == str(old)


def test_without_anything_trainable() -> None:
    """Where nothing but the image is in the graph, and the offsets do not come from it."""
    for name in ("offsets", "attention", "mmcv attention"):
        model = make(name).requires_grad_(False)
        if name != "offsets":
            model.call = attend_from_embeddings
        images = torch.randn(1, 2, 12, 16).double()
        (found,) = effective_sampling(first_output(model), images)
        assert found.norms.max() > 1e-3


def attend_from_embeddings(layer: nn.Module, map: Tensor) -> Tensor:
    shapes = torch.tensor([[6, 8], [3, 4]])
    tokens = [map.flatten(2), nn.functional.avg_pool2d(map, 2).flatten(2)]
    query = torch.linspace(-1, 1, 8).to(map).view(2, 1, 4)
    points = map.new_tensor([[0.42, 0.55], [0.61, 0.33]])[None, :, None].expand(-1, -1, 2, -1)
    return layer(
        query, value=torch.cat(tokens, -1).permute(2, 0, 1), identity=torch.zeros_like(query),
        reference_points=points, spatial_shapes=shapes, level_start_index=torch.tensor([0, 48]),
    ).permute(1, 2, 0)[..., None]  # fmt: skip

"""A recording tells what the layers really read, and leaves the model as it was.

An image whose two channels are the x and y of its pixels shows every position: an average of it is
a position again, and a weighted sum of samples is the sum of weighted positions.
"""

import copy
from collections.abc import Callable

import mmcv.ops
import pytest
import torch
from torch import Tensor, nn

from mmdeform.analysis.recording import KeysCall, record
from mmdeform.layers import (
    DCNv3,
    DCNv4,
    DeformableAttention2d,
    DeformConv2dPack,
    DeformPSRoIPoolPack,
    DeformRoIPoolPack,
    ModulatedDeformConv2dPack,
    ModulatedDeformRoIPoolPack,
    MultiScaleDeformableAttention,
    SingleLevelDeformableAttention,
)
from mmdeform.layers.predictors import predictors

WIDTH, HEIGHT = 80, 64


def position_image(width: int = WIDTH, height: int = HEIGHT) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y])[None].double()


def averaging(kernel: int, stride: int, padding: int = 0) -> nn.Conv2d:
    layer = nn.Conv2d(2, 2, kernel, stride, padding, groups=2, bias=False)
    nn.init.constant_(layer.weight, 1 / kernel**2)
    return layer


class Model(nn.Module):
    """A stem and a layer, with what the layer needs beside a map as a function of the map."""

    def __init__(
        self, stem: nn.Module, layer: nn.Module, call: Callable[..., Tensor] | None = None
    ) -> None:
        super().__init__()
        self.stem, self.layer, self.call = stem, layer, call
        for predictor in predictors(layer):
            # As far as samples of interior outputs stay inside the map.
            last = [part for part in predictor.module.modules() if hasattr(part, "bias")][-1]
            if last.bias is not None:
                nn.init.uniform_(last.bias, -0.8, 0.8)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        map = self.stem(inputs)
        return self.layer(map) if self.call is None else self.call(self.layer, map)


def identity(*linears: nn.Module) -> None:
    for linear in linears:
        weight = linear.weight.data
        weight.copy_(torch.eye(len(weight)).view(weight.shape))
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


def dense(layer: nn.Module) -> nn.Module:
    """Sums the samples of each channel."""
    nn.init.zeros_(layer.weight)
    for channel in range(2):
        layer.weight.data[channel, channel] = 1
    return layer


def dcnv3() -> nn.Module:
    layer = DCNv3(2, 2, 3, stride=2, padding=1, group=1)
    identity(layer.input_proj, layer.output_proj)
    return layer


def dcnv4() -> nn.Module:
    layer = DCNv4(2, 2, 3, padding=1, group=1, channels_last=True)
    identity(layer.value_proj, layer.output_proj)
    return layer


def channels_last(layer: nn.Module, map: Tensor) -> Tensor:
    return layer(map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


CONVOLUTIONS = {
    "v1": (lambda: dense(DeformConv2dPack(2, 2, 3, padding=2, dilation=2)), None),
    "v2": (lambda: dense(ModulatedDeformConv2dPack(2, 2, 3, stride=2, padding=1)), None),
    "mmcv v1": (lambda: dense(mmcv.ops.DeformConv2dPack(2, 2, 3, padding=1)), None),
    "mmcv v2": (lambda: dense(mmcv.ops.ModulatedDeformConv2dPack(2, 2, (3, 1), padding=1)), None),
    "v3": (dcnv3, None),
    "v4": (dcnv4, channels_last),
}
STEMS = {"patches": averaging(4, 4), "padded": averaging(3, 2, 1)}


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, stem: str) -> None:
    make, call = CONVOLUTIONS[name]
    model = Model(copy.deepcopy(STEMS[stem]), make(), call)
    with record(model) as recording:
        output = model(position_image())
    assert len(recording) == 1 and recording.names == ["layer"]
    layer = recording["layer"]
    assert layer.kind == "convolution" and layer.image_size == (WIDTH, HEIGHT)
    assert layer.output_size == output.shape[2:]

    x, y = 40.3, 33.1
    index = layer.nearest(x, y)
    center = layer.centers()[index]
    stride = torch.tensor(layer.output_grid.stride)
    assert ((center - torch.tensor([x, y])).abs() <= stride / 2 + 1e-9).all()
    samples = layer.samples(index)
    torch.testing.assert_close(samples.center, center)
    torch.testing.assert_close(samples.regular.mean(0), center)  # the centre of its window
    assert (samples.points - samples.regular).abs().max() > 0.1
    read = (samples.weights[:, None] * samples.points).sum(0)
    torch.testing.assert_close(read, output[0].flatten(1)[:, index])
    assert samples.groups.tolist() == [0] * len(samples.points) == samples.levels.tolist()


def test_of_several_images_and_groups() -> None:
    layer = ModulatedDeformConv2dPack(4, 4, 3, padding=1, deform_groups=2)
    nn.init.normal_(layer.conv_offset.weight)
    with record(layer) as recording:
        layer(torch.randn(2, 4, 8, 8))
    call = recording[""]
    samples = call.samples(3 * 8 + 5, image=1)
    assert samples.groups.tolist() == [0] * 9 + [1] * 9
    assert torch.equal(samples.points[9:], call.locations[1, 1, :, 3, 5])
    assert torch.equal(samples.weights[9:], call.weights[1, 1, :, 3, 5])
    assert torch.equal(samples.regular[:9], samples.regular[9:])


def attention(kind: type[nn.Module], mmcv_kernels: bool = False) -> nn.Module:
    levels = 1 if kind is SingleLevelDeformableAttention else 2
    layer = kind(embed_dims=2, num_heads=1, num_levels=levels, num_points=3, dropout=0.0)
    identity(layer.value_proj, layer.output_proj)
    return layer


def attend(queries: str) -> Callable[[nn.Module, Tensor], Tensor]:
    """Calls attention over two levels, with their pixels or some boxes as queries."""

    def call(layer: nn.Module, map: Tensor) -> Tensor:
        maps = [map, nn.functional.avg_pool2d(map, 2)]
        value = torch.cat([level.flatten(2) for level in maps], 2).permute(2, 0, 1)
        shapes = torch.tensor([level.shape[2:] for level in maps])
        sizes = shapes.flip(-1)
        if queries == "pixels":
            points = [
                (position_image(*size).flatten(2).mT + 0.5) / torch.tensor(size)
                for size in sizes.tolist()
            ]
            reference = torch.cat(points, 1)[:, :, None].expand(-1, -1, 2, -1)
        else:
            reference = torch.tensor([[0.4, 0.55, 0.2, 0.3], [0.5, 0.5, 0.3, 0.1]])
            reference = reference[None, :, None].expand(-1, -1, 2, -1).double()
        query = torch.zeros(reference.shape[1], 1, 2, dtype=map.dtype)
        starts = torch.tensor([0, maps[0].shape[2:].numel()])
        output = layer(
            query, value=value, reference_points=reference, spatial_shapes=shapes,
            level_start_index=starts,
        )  # fmt: skip
        return output.permute(1, 2, 0)

    return call


@pytest.mark.parametrize(
    "kind, queries",
    [
        (MultiScaleDeformableAttention, "pixels"),
        (MultiScaleDeformableAttention, "boxes"),
        (mmcv.ops.MultiScaleDeformableAttention, "pixels"),
        (mmcv.ops.MultiScaleDeformableAttention, "boxes"),
        (SingleLevelDeformableAttention, "pixels"),  # it takes no other queries
    ],
    ids=["ours-pixels", "ours-boxes", "mmcv-pixels", "mmcv-boxes", "single-level"],
)
def test_attention(kind: type[nn.Module], queries: str) -> None:
    model = Model(averaging(4, 4), attention(kind), attend(queries))
    with record(model) as recording:
        output = model(position_image())
    call = recording["layer"]
    assert call.kind == "attention" and call.is_encoder == (queries == "pixels")
    assert call.level_sizes == ((20, 16), (10, 8))
    centers = call.centers()
    if queries == "boxes":
        query = 0
        expected = torch.tensor([0.4 * WIDTH - 0.5, 0.55 * HEIGHT - 0.5])
        torch.testing.assert_close(centers[query], expected.double())
        with pytest.raises(ValueError, match="queries of layer are not pixels"):
            call.level_of(query)
    else:
        query = 320 + 4 * 10 + 5  # of the second level, whose pixels are 8 x 8 pixels
        torch.testing.assert_close(centers[query], torch.tensor([43.5, 35.5]).double())
        assert call.nearest(43.5, 35.5) == query
        assert [call.level_of(q) for q in (0, 319, 320, 399)] == [0, 0, 1, 1]
        with pytest.raises(IndexError, match="less than 400, got 400"):
            call.level_of(400)
    samples = call.samples(query)
    torch.testing.assert_close(samples.regular, centers[query].expand_as(samples.points))
    torch.testing.assert_close(samples.weights.sum(), torch.ones([]).double())
    read = (samples.weights[:, None] * samples.points).sum(0)
    torch.testing.assert_close(read, output[0, :, query])
    levels = [1] * 3 if kind is SingleLevelDeformableAttention else [0] * 3 + [1] * 3
    assert samples.levels.tolist() == levels


def keys(version: str) -> nn.Module:
    layer = DeformableAttention2d(
        2, 1, stride=2, kernel_size=3, version=version, offset_range_factor=-1
    )
    identity(layer.proj_v, layer.proj_out)
    return layer


@pytest.mark.parametrize("version", ["v1", "pp"])
def test_keys(version: str) -> None:
    model = Model(averaging(4, 4), keys(version))
    with record(model) as recording:
        output = model(position_image())
    call = recording["layer"]
    assert isinstance(call, KeysCall) and call.kind == "keys" and call.map_size == (16, 20)
    index = call.nearest(41, 30)
    assert call.centers()[index].tolist() == [41.5, 29.5] and index == 7 * 20 + 10
    samples = call.samples(index)
    inside = (samples.points >= 1.5) & (samples.points <= torch.tensor([77.5, 61.5]))
    assert inside.all() and len(samples.points) == 80
    read = (samples.weights[:, None] * samples.points).sum(0)
    torch.testing.assert_close(read, output[0].flatten(1)[:, index])
    torch.testing.assert_close(call.attention(torch.tensor([index])).mean(0), samples.weights)
    pair = torch.tensor([index, index + 3])
    mean = torch.stack([call.attention(query[None]) for query in pair]).mean(0)
    torch.testing.assert_close(call.attention(pair), mean)
    with pytest.raises(ValueError, match="queries must hold at least one"):
        call.attention(torch.tensor([], dtype=torch.int64))


ROIS = torch.tensor([[0, 10.0, 12, 60, 50], [0, 16, 8, 40, 56], [1, 16, 8, 40, 56]]).double()


def pooling(kind: type[nn.Module]) -> Model:
    sizes = dict(output_size=(3, 2), spatial_scale=0.25)
    if kind is DeformPSRoIPoolPack:
        layer = kind(
            in_channels=2, output_size=3, spatial_scale=0.25, output_channels=2, num_classes=2,
            group_size=1,
        )  # fmt: skip
        return Model(averaging(4, 4), layer, lambda layer, map: layer(map, ROIS, map))
    layer = kind(output_channels=2, sampling_ratio=2, **sizes)
    return Model(averaging(4, 4), layer, lambda layer, map: layer(map, ROIS))


@pytest.mark.parametrize(
    "kind", [DeformRoIPoolPack, ModulatedDeformRoIPoolPack, DeformPSRoIPoolPack]
)
def test_roi_pooling(kind: type[nn.Module]) -> None:
    model = pooling(kind)
    with record(model) as recording:
        output = model(position_image().expand(2, -1, -1, -1))
    call = recording["layer"]
    assert call.kind == "roi_pooling" and torch.equal(call.rois, ROIS)
    assert call.nearest(35, 30, image=0) == 0 and call.nearest(35, 30, image=1) == 2
    with pytest.raises(ValueError, match="no RoI of image 2"):
        call.nearest(35, 30, image=2)
    assert call.centers(1)[2].tolist() == [27.5, 31.5] and call.centers(1)[:2].isnan().all()
    for roi in range(len(ROIS)):
        samples = call.samples(roi)
        torch.testing.assert_close(samples.center, (ROIS[roi, 1:3] + ROIS[roi, 3:]) / 2 - 0.5)
        # Each bin for itself; classes of position-sensitive pooling read a channel each.
        read = (samples.weights[:, None] * samples.points).view(-1, output[0, 0].numel(), 2)
        expected = output[roi].flatten(1)
        for channel in range(2):
            torch.testing.assert_close(
                read[min(channel, len(read) - 1), :, channel], expected[channel]
            )
        assert (samples.points - samples.regular).abs().max() > 0.5
    width, height = ((ROIS[0, 3:] - ROIS[0, 1:3]) / torch.tensor(output.shape[:1:-1])).tolist()
    assert call.bin_sizes[0].tolist() == pytest.approx([width, height])


class Mixed(nn.Module):
    """One layer of everything, one of them called twice, with BatchNorm and dropout on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(averaging(2, 2), nn.BatchNorm2d(2), nn.Dropout(0.3))
        self.shared = ModulatedDeformConv2dPack(2, 2, 3, padding=1)
        self.dcnv3 = DCNv3(2, 2, 3, padding=1, group=1, norm_layer="BN")
        self.keys = DeformableAttention2d(2, 1, num_groups=1, attn_drop=0.2)
        self.attention = MultiScaleDeformableAttention(2, 1, num_levels=2, num_points=2)
        self.pool = ModulatedDeformRoIPoolPack(
            output_size=(2, 2), output_channels=2, spatial_scale=0.5, deform_fc_channels=4
        )
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        map = self.shared(self.shared(self.stem(inputs)))
        map = self.keys(self.dcnv3(map))
        attended = attend("boxes")(self.attention, map)
        rois = torch.tensor([[0, 2.0, 2, 12, 12], [0, 1, 3, 9, 15]]).to(map)
        return self.pool(map, rois).sum() + attended.square().sum()


def snapshot(model: nn.Module, watch: bool) -> list[Tensor]:
    torch.manual_seed(3)
    image = torch.randn(1, 2, 16, 20, dtype=torch.float64, requires_grad=True)
    if watch:
        with record(model) as recording:
            loss = model(inputs=image)
        names = ["shared", "shared", "dcnv3", "keys", "attention", "pool"]
        assert [call.name for call in recording] == names
        assert all(not call.locations.requires_grad for call in recording)
    else:
        loss = model(inputs=image)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [loss, image.grad, *gradients, *model.buffers(), torch.get_rng_state()]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_as_it_is(training: bool) -> None:
    model = Mixed().train(training)
    twin = copy.deepcopy(model)
    for plain, watched in zip(snapshot(twin, False), snapshot(model, True), strict=True):
        assert torch.equal(plain, watched)
    assert all(not module._forward_hooks for module in model.modules())
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_calls_by_name_kind_and_pattern() -> None:
    model = Mixed().eval()
    with record(model) as recording:
        model(torch.randn(1, 2, 16, 20, dtype=torch.float64))
    assert recording.names == ["shared", "dcnv3", "keys", "attention", "pool"]
    first, second = recording.calls("shared")
    assert recording["shared"] is second and recording[0] is first and second is not first
    assert recording[-1].name == "pool" and [call.name for call in recording[2:4]] == [
        "dcnv3",
        "keys",
    ]
    assert [call.name for call in recording.of_kind("convolution")] == ["shared", "shared", "dcnv3"]
    with pytest.raises(KeyError, match="no call of 'stem' was recorded; recorded layers: shared"):
        recording["stem"]
    with record(model, ["key*", "pool"]) as recording:
        model(torch.randn(1, 2, 16, 20, dtype=torch.float64))
    assert recording.names == ["keys", "pool"]
    with (
        pytest.raises(ValueError, match="'neck' matches no deformable layer"),
        record(model, "neck"),
    ):
        pass


def test_maps_of_rois_have_no_place() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = DeformConv2dPack(2, 2, 3, padding=1)
            self.head = nn.ModuleList([DeformConv2dPack(2, 2, 3), DeformableAttention2d(2, 1)])

        def forward(self, inputs: Tensor) -> Tensor:
            rois = self.body(inputs)[:1].repeat(5, 1, 1, 1)
            return [layer(rois) for layer in self.head]

    model = Head()
    with record(model) as recording:
        model(torch.zeros(2, 2, 8, 8))
    assert recording.names == ["body"] and recording.without_place == ["head.0", "head.1"]


def test_hooks_are_gone_after_an_error() -> None:
    model = Mixed()
    with pytest.raises(ZeroDivisionError), record(model):
        raise ZeroDivisionError
    assert all(not module._forward_hooks for module in model.modules())

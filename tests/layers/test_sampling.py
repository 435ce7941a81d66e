"""What the layers report of their sampling is what they do."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmcv.ops")
from mmcv.ops import deform_conv as mmcv_v1
from mmcv.ops import modulated_deform_conv as mmcv_v2
from mmcv.ops import multi_scale_deform_attn as mmcv_msda

from mmdeform.layers import (
    DCNv3,
    DCNv4,
    DeformableAttention2d,
    DeformConv2d,
    DeformConv2dPack,
    DeformPSRoIPool,
    DeformPSRoIPoolPack,
    DeformRoIPool,
    DeformRoIPoolPack,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
    ModulatedDeformRoIPoolPack,
    MultiScaleDeformableAttention,
    SingleLevelDeformableAttention,
)
from mmdeform.layers.sampling import (
    Sampling,
    sampled,
)

mmcv_roi = importlib.import_module("mmcv.ops.deform_roi_pool")
GEOMETRY = dict(stride=(2, 1), padding=(1, 2), dilation=(1, 2))


def shake(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """Random parameters, so that offsets and masks differ everywhere; fp64."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=scale)
    return module.double()


def read(map: Tensor, locations: Tensor) -> Tensor:
    """Bilinear samples (N, C, A, B) of (N, C, H, W) at (x, y) of shape (N, A, B, 2)."""
    scale = locations.new_tensor([map.shape[3] - 1, map.shape[2] - 1]) / 2
    return nn.functional.grid_sample(map, locations / scale - 1, align_corners=True)


def ramps(height: int, width: int) -> Tensor:
    """An image of two channels, x and y: a sample is its location."""
    y, x = torch.meshgrid(
        torch.arange(height).double(), torch.arange(width).double(), indexing="ij"
    )
    return torch.stack([x, y])[None]


def check_shapes(sampling: Sampling) -> None:
    shape = sampling.locations.shape
    assert sampling.offset.shape == shape and shape[-1] == 2
    assert torch.broadcast_shapes(sampling.grid.shape, shape) == shape
    assert torch.broadcast_shapes(sampling.size.shape, shape) == shape
    assert sampling.outside.shape == shape[:-1]
    assert (sampling.mask is None) == (sampling.weighting == "none")
    if sampling.mask is not None:
        assert sampling.mask.shape == shape[:-1]
        total = sampling.mask.sum(sampling.sample_dims)
        if sampling.weighting == "softmax":
            torch.testing.assert_close(total, torch.ones_like(total))


class TestConvolutions:
    """The locations, read by ``grid_sample`` and weighed, give the output."""

    @pytest.mark.parametrize(
        "kind",
        [
            DeformConv2dPack,
            ModulatedDeformConv2dPack,
            mmcv_v1.DeformConv2dPack,
            mmcv_v2.ModulatedDeformConv2dPack,
        ],
        ids=lambda kind: f"{kind.__module__.split('.')[0]}-{kind.__name__}",
    )
    def test_grid_sample_gives_the_output(self, kind: type) -> None:
        layer = shake(kind(4, 3, (3, 2), deform_groups=2, bias=False, **GEOMETRY))
        x = torch.randn(2, 4, 9, 11).double()
        sampling = sampled(layer, (x,))
        check_shapes(sampling)
        torch.testing.assert_close(sampling.locations, sampling.grid + sampling.offset)
        batch, groups, taps, *out, _ = sampling.locations.shape
        values = read(
            x.reshape(batch * groups, -1, 9, 11),
            sampling.locations.reshape(batch * groups, taps, -1, 2),
        )
        values = values.reshape(batch, groups, -1, taps, *out)
        if sampling.mask is not None:
            values = values * sampling.mask[:, :, None]
        columns = values.flatten(1, 2)  # (N, C, K, Ho, Wo)
        expected = torch.einsum("ock,nckhw->nohw", layer.weight.flatten(2), columns)
        torch.testing.assert_close(layer(x), expected)
        assert 0.02 < sampling.outside.double().mean() < 0.9

    @pytest.mark.parametrize("module", ["mmdeform", "mmcv"])
    def test_offsets_as_an_input(self, module: str) -> None:
        ours = module == "mmdeform"
        v1 = DeformConv2d if ours else mmcv_v1.DeformConv2d
        v2 = ModulatedDeformConv2d if ours else mmcv_v2.ModulatedDeformConv2d
        x = torch.zeros(1, 2, 5, 6)
        offset, mask = torch.randn(1, 18, 5, 6), torch.rand(1, 9, 5, 6)
        plain = sampled(v1(2, 1, 3, padding=1), (x, offset))
        assert plain.mask is None
        modulated = sampled(v2(2, 1, 3, padding=1), (x,), dict(mask=mask, offset=offset))
        assert torch.equal(modulated.mask[0, 0], mask[0])
        for sampling in (plain, modulated):
            check_shapes(sampling)
            assert torch.equal(sampling.offset[0, 0, 4, 2, 3], offset[0, [9, 8], 2, 3])

    def test_offsets_of_a_larger_map(self) -> None:
        """As mmdet's DyHead hands them to mmcv's layer."""
        layer = shake(mmcv_v2.ModulatedDeformConv2d(2, 3, 3, padding=1, bias=False))
        x = torch.randn(2, 2, 4, 5).double()
        offset, mask = torch.randn(2, 18, 8, 10).double(), torch.rand(2, 9, 8, 10).double()
        sampling = sampled(layer, (x, offset, mask))
        check_shapes(sampling)
        values = read(x, sampling.locations[:, 0].flatten(2, 3)).unflatten(-1, (4, 5))
        values = values * sampling.mask
        expected = torch.einsum("ock,nckhw->nohw", layer.weight.flatten(2), values)
        torch.testing.assert_close(layer(x, offset, mask), expected)

    def test_locations_are_where_the_operator_reads(self) -> None:
        # Output channel (group, axis, tap) reads one tap of one ramp.
        image, groups, taps = ramps(30, 26).repeat(1, 2, 1, 1), 2, 6
        layer = DeformConv2d(4, 24, (3, 2), groups=1, deform_groups=groups, **GEOMETRY).double()
        layer.weight.data = torch.eye(24).view(24, 4, 3, 2).double()
        offset = torch.rand(1, 24, 15, 28).double() * 3 - 1.5
        output = layer(image, offset).view(groups, 2, taps, 15, 28).permute(0, 2, 3, 4, 1)
        locations = sampled(layer, (image, offset)).locations[0]
        inside = ((locations >= 0) & (locations <= torch.tensor([25, 29]))).all(-1)
        assert inside.double().mean() > 0.7
        torch.testing.assert_close(output[inside], locations[inside])

    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("kind", [DCNv3, DCNv4])
    def test_dcnv3_and_dcnv4(self, kind: type, channels_last: bool) -> None:
        options = dict(group=2, offset_scale=1.5, channels_last=channels_last)
        layer = shake(kind(4, 3, 3, stride=2, padding=1, remove_center=True, **options))
        x = torch.randn(2, 4, 9, 12).double()
        given = x.permute(0, 2, 3, 1) if channels_last else x
        sampling = sampled(layer, (), dict(x=given))
        check_shapes(sampling)
        assert sampling.weighting == ("softmax" if kind is DCNv3 else "linear")
        torch.testing.assert_close(sampling.locations, sampling.grid + sampling.offset)
        batch, groups, taps, *out, _ = sampling.locations.shape
        assert taps == 8 and sampling.size.tolist() == [12, 9]
        project = layer.input_proj if kind is DCNv3 else layer.value_proj
        value = project(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        values = read(
            value.reshape(batch * groups, -1, 9, 12),
            sampling.locations.reshape(batch * groups, taps, -1, 2),
        )
        values = values.reshape(batch, groups, -1, taps, *out) * sampling.mask[:, :, None]
        expected = layer.output_proj(values.sum(3).flatten(1, 2).permute(0, 2, 3, 1))
        output = layer(given)
        torch.testing.assert_close(
            output if channels_last else output.permute(0, 2, 3, 1), expected
        )

    @pytest.mark.parametrize("kind", [DeformConv2dPack, ModulatedDeformConv2dPack, DCNv3, DCNv4])
    def test_without_offsets_there_is_the_regular_grid(self, kind: type) -> None:
        sampling = sampled(kind(16, 16, 3, stride=2, padding=1), (torch.randn(1, 16, 8, 6),))
        regular = {(x, y) for x in (3, 4, 5) for y in (5, 6, 7)}
        points = sampling.locations[0, 0, :, 3, 2]
        assert {tuple(point) for point in points.int().tolist()} == regular
        assert torch.equal(sampling.locations, sampling.grid.expand_as(sampling.locations))
        assert not sampling.offset.any()

    def test_a_known_offset_moves_one_point(self) -> None:
        layer = ModulatedDeformConv2dPack(1, 1, 3, padding=1)
        layer.conv_offset.bias.data[2 * 5 : 2 * 5 + 2] = torch.tensor([2.5, -0.5])  # (dy, dx)
        layer.conv_offset.bias.data[18] = 100.0
        sampling = sampled(layer, (torch.zeros(1, 1, 8, 8),))
        assert sampling.locations[0, 0, 5, 4, 3].tolist() == [4 - 0.5, 4 + 2.5]
        assert sampling.offset.flatten(0, -2).any(-1).sum() == 64
        assert sampling.mask[0, 0, :2, 4, 3].tolist() == [1, 0.5]

    def test_outside_is_where_nothing_is_read(self) -> None:
        x = torch.ones(1, 1, 4, 5)
        layer = DeformConv2d(1, 1, 1)
        layer.weight.data.fill_(1.0)
        offset = torch.zeros(1, 2, 4, 5)
        offset[0, :, 0, 0] = torch.tensor([-0.999, -0.999])
        offset[0, :, 1, 1] = torch.tensor([0.0, -2.0])  # at x = -1
        offset[0, :, 2, 2] = torch.tensor([2.0, 0.0])  # at y = 4
        offset[0, :, 3, 4] = torch.tensor([0.999, 0.999])
        offset[0, :, 3, 3] = torch.tensor([float("nan"), 0.0])
        outside = sampled(layer, (x, offset)).outside[0, 0, 0]
        assert torch.equal(outside, layer(x, offset)[0, 0] == 0)
        assert outside.sum() == 3


class TestAttention:
    SHAPES = ((6, 8), (3, 4))

    def inputs(self, coordinates: int) -> dict[str, Any]:
        tokens = sum(h * w for h, w in self.SHAPES)
        reference_points = torch.rand(2, 5, 2, coordinates).double()
        return dict(
            query=torch.randn(5, 2, 16).double(),
            query_pos=torch.randn(5, 2, 16).double(),
            value=torch.randn(tokens, 2, 16).double(),
            identity=torch.zeros(5, 2, 16).double(),
            reference_points=reference_points,
            spatial_shapes=torch.tensor(self.SHAPES),
            level_start_index=torch.tensor([0, 48]),
        )

    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("coordinates", [2, 4])
    @pytest.mark.parametrize(
        "kind", [MultiScaleDeformableAttention, mmcv_msda.MultiScaleDeformableAttention]
    )
    def test_grid_sample_gives_the_output(
        self, kind: type, coordinates: int, batch_first: bool
    ) -> None:
        layer = shake(kind(16, 2, 2, 3, dropout=0.0, batch_first=batch_first))
        inputs = self.inputs(coordinates)
        if batch_first:
            for name in ("query", "query_pos", "value", "identity"):
                inputs[name] = inputs[name].transpose(0, 1)
        query = inputs.pop("query")
        sampling = sampled(layer, (query,), inputs)
        check_shapes(sampling)
        assert sampling.locations.shape == (2, 5, 2, 2, 3, 2)
        torch.testing.assert_close(sampling.locations, sampling.grid + sampling.offset)
        value = inputs["value"] if batch_first else inputs["value"].transpose(0, 1)
        levels = layer.value_proj(value).unflatten(-1, (2, -1)).split([48, 12], 1)
        total: Any = 0
        for level, (height, width) in enumerate(self.SHAPES):
            map = levels[level].permute(0, 2, 3, 1).reshape(4, -1, height, width)
            locations = sampling.locations[:, :, :, level].transpose(1, 2).flatten(0, 1)
            weights = sampling.mask[:, :, :, level].transpose(1, 2).flatten(0, 1)
            total = total + (read(map, locations) * weights[:, None]).sum(-1)
        expected = layer.output_proj(total.reshape(2, 16, 5).transpose(1, 2))
        output = layer(query, **inputs)
        torch.testing.assert_close(output if batch_first else output.transpose(0, 1), expected)

    @pytest.mark.parametrize("coordinates", [2, 4])
    def test_own_level_is_the_multi_scale_attention_of_each_level(self, coordinates: int) -> None:
        layer = shake(SingleLevelDeformableAttention(embed_dims=16, num_heads=2, num_points=3))
        twin = MultiScaleDeformableAttention(16, 2, 1, 3).double()
        twin.load_state_dict(layer.state_dict())
        query, points = torch.randn(60, 2, 16).double(), torch.rand(2, 60, 2, coordinates).double()
        shapes = torch.tensor(self.SHAPES)
        sampling = sampled(layer, (query,), dict(reference_points=points, spatial_shapes=shapes))
        check_shapes(sampling)
        for level, tokens in enumerate([slice(0, 48), slice(48, 60)]):
            inputs = dict(
                reference_points=points[:, tokens, level : level + 1],
                spatial_shapes=shapes[level : level + 1],
            )
            expected = sampled(twin, (query[tokens],), inputs)
            for name in ("offset", "locations", "grid", "mask"):
                got = getattr(sampling, name)[:, tokens]
                torch.testing.assert_close(got, getattr(expected, name).expand_as(got))
            assert torch.equal(sampling.outside[:, tokens], expected.outside)

    def test_offsets_are_pixels_of_the_level(self) -> None:
        layer = MultiScaleDeformableAttention(16, 2, 2, 3).double()
        inputs = self.inputs(2)
        sampling = sampled(layer, (), inputs)
        initial = layer.sampling_offsets.bias.view(2, 2, 3, 2)
        torch.testing.assert_close(sampling.offset[1, 2], initial)
        corner = inputs["reference_points"][1, 2]
        sizes = torch.tensor([[8.0, 6.0], [4.0, 3.0]]).double()
        torch.testing.assert_close(sampling.grid[1, 2, 0, :, 0], corner * sizes - 0.5)
        assert torch.equal(sampling.size.flatten(0, 1), sizes)


class TestDAT:
    @pytest.mark.parametrize("version", ["v1", "pp"])
    @pytest.mark.parametrize("factor", [2.0, -1])
    def test_grid_sample_gives_the_output(self, version: str, factor: float) -> None:
        layer = shake(
            DeformableAttention2d(
                8, 4, 2, stride=(2, 3), offset_range_factor=factor, version=version,
                position_bias=None,
            )
        )  # fmt: skip
        x = torch.randn(2, 8, 7, 9).double()
        sampling = sampled(layer, (x,))
        check_shapes(sampling)
        assert sampling.locations.shape == (2, 2, 4, 3, 2) and sampling.offset.any()
        torch.testing.assert_close(sampling.locations, sampling.grid + sampling.offset)
        values = read(x.view(4, 4, 7, 9), sampling.locations.flatten(0, 1)).view(2, 8, 1, 12)
        key, value = (project(values).view(2, 4, 2, 12) for project in (layer.proj_k, layer.proj_v))
        query = layer.proj_q(x).view(2, 4, 2, 63)
        weights = (query.transpose(2, 3) @ key / 2**0.5).softmax(-1)
        output = layer.proj_out((value @ weights.transpose(2, 3)).view(2, 8, 7, 9))
        torch.testing.assert_close(layer(x), output)

    def test_keys_start_between_pixels_of_a_known_grid(self) -> None:
        layer = DeformableAttention2d(4, 1, stride=2, use_offsets=False, version="v1")
        sampling = sampled(layer, (torch.zeros(1, 4, 8, 4),))
        assert not sampling.offset.any() and torch.equal(sampling.locations, sampling.grid)
        # Keys divide the range between the centres of the first and the last pixel.
        expected = [0.375, 1.125, 1.875, 2.625]
        assert sampling.grid[0, 0, :, 0, 1].tolist() == pytest.approx([7 / 3 * x for x in expected])
        assert sampling.grid[0, 0, 0, :, 0].tolist() == pytest.approx([0.75, 2.25])


ROIS = torch.tensor([[0.0, 8, 4, 24, 20], [1, 4, 8, 28, 24]])


class TestRoIPooling:
    """An image of ramps shows the mean location of each bin's samples."""

    IMAGES = ramps(16, 16).repeat(2, 1, 1, 1)

    @pytest.mark.parametrize(
        "kind", [DeformRoIPoolPack, ModulatedDeformRoIPoolPack], ids=lambda kind: kind.__name__
    )
    @pytest.mark.parametrize("head", ["mmcv", "paper"])
    def test_packs(self, kind: type, head: str) -> None:
        layer = shake(kind((3, 4), 2, 8, spatial_scale=0.5, gamma=0.2, head=head), scale=0.02)
        rois = ROIS.double()
        sampling = sampled(layer, (self.IMAGES, rois))
        check_shapes(sampling)
        assert sampling.locations.shape == (2, 3, 4, 2) and sampling.offset.any()
        output = layer(self.IMAGES, rois).movedim(1, -1)
        mask = 1 if sampling.mask is None else sampling.mask[..., None]
        torch.testing.assert_close(output, sampling.locations * mask)
        extent = torch.tensor([[8.0, 8], [12, 8]]).double()[:, None, None]
        torch.testing.assert_close(sampling.locations, sampling.grid + sampling.offset * extent)

    def test_offsets_and_mask_as_inputs(self) -> None:
        layer = DeformRoIPool((2, 2), spatial_scale=0.5, gamma=0.1)
        plain = sampled(layer, (self.IMAGES.float(), ROIS))
        assert torch.equal(plain.locations, plain.grid) and plain.weighting == "none"
        offset, mask = torch.rand(2, 2, 2, 2), torch.rand(2, 2, 2)
        moved = sampled(layer, (self.IMAGES.float(), ROIS), dict(offset=offset, mask=mask))
        check_shapes(moved)
        assert torch.equal(moved.mask, mask)
        torch.testing.assert_close(moved.offset[1, 0, 1], 0.1 * offset[1, :, 0, 1])
        output = layer(self.IMAGES.float(), ROIS, offset).movedim(1, -1)
        torch.testing.assert_close(output, moved.locations)

    @pytest.mark.parametrize("kind", ["DeformRoIPoolPack", "ModulatedDeformRoIPoolPack"])
    def test_mmcvs_classes(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        # mmcv has no kernel for the CPU; the rest of its layer is the same as ours.
        ours = shake(globals()[kind]((3, 4), 2, 8, spatial_scale=0.5, gamma=0.2), scale=0.1)
        layer = getattr(mmcv_roi, kind)((3, 4), 2, 8, spatial_scale=0.5, gamma=0.2).double()
        layer.load_state_dict(ours.state_dict())
        monkeypatch.setattr(mmcv_roi.DeformRoIPool, "forward", DeformRoIPool.forward)
        inputs = (self.IMAGES, ROIS.double())
        expected, sampling = sampled(ours, inputs), sampled(layer, inputs)
        check_shapes(sampling)
        torch.testing.assert_close(sampling.locations, expected.locations)
        torch.testing.assert_close(sampling.mask, expected.mask)

    def test_position_sensitive(self) -> None:
        # Both classes have both ramps as their two channels.
        layer = shake(DeformPSRoIPoolPack(3, (4, 6), 0.5, 4, 2, group_size=1, part_size=2))
        maps, rois = self.IMAGES.repeat(1, 2, 1, 1), ROIS.double()
        rois[0, 1:] += 0.5  # the operator rounds
        rois[1, 3:] = rois[1, 1:3] - 1  # and keeps them from being empty
        features = torch.randn(2, 3, 16, 16).double()
        sampling = sampled(layer, (maps, rois, features))
        check_shapes(sampling)
        assert sampling.locations.shape == (2, 2, 4, 6, 2) and sampling.offset.any()
        output = layer(maps, rois, features).unflatten(1, (2, 2)).movedim(2, -1)
        torch.testing.assert_close(output, sampling.locations)
        plain = sampled(layer, (maps, rois, torch.zeros_like(features)))
        bias = layer.conv_offset.bias.view(2, 2, 2, 2)[:, :, 1, 0]
        torch.testing.assert_close(plain.offset[0, :, 3, 2], 0.1 * bias)

    def test_position_sensitive_with_offsets_as_an_input(self) -> None:
        layer = DeformPSRoIPool(4, 0.5, 2, group_size=1)
        inputs = (self.IMAGES.float(), ROIS)
        plain = sampled(layer, inputs)
        check_shapes(plain)
        assert not plain.offset.any() and plain.locations.shape == (2, 1, 4, 4, 2)
        torch.testing.assert_close(layer(*inputs).movedim(1, -1), plain.locations[:, 0])

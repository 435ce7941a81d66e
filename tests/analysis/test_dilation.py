"""Effective dilation is that of the paper, and is sorted by what lies where in the image."""

import math
from typing import Any

import mmcv.ops
import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmdet")
import cv2
from mmengine import Config
from mmengine.registry import init_default_scope

from mmdeform.analysis.dilation import (
    CLASSES,
    EffectiveDilation,
    LayerDilation,
    Spread,
    adjacent_taps,
    effective_dilation,
    object_classes,
)
from mmdeform.analysis.recording import record
from mmdeform.layers import (
    DCNv3,
    DCNv4,
    DeformableAttention2d,
    DeformConv2d,
    DeformConv2dPack,
    ModulatedDeformConv2dPack,
    MultiScaleDeformableAttention,
)

FAMILIES = {
    "v1": DeformConv2dPack,
    "v2": ModulatedDeformConv2dPack,
    "mmcv v1": mmcv.ops.DeformConv2dPack,
    "mmcv v2": mmcv.ops.ModulatedDeformConv2dPack,
    "v3": lambda *args, **kwargs: DCNv3(*args, group=2, **kwargs),
    "v3 without centre": lambda *args, **kwargs: DCNv3(
        *args, group=2, remove_center=True, **kwargs
    ),
    "v4": lambda *args, **kwargs: DCNv4(*args, group=2, **kwargs),
}


def dilation_of(layer: nn.Module, channels: int = 32) -> Tensor:
    with record(layer) as recording:
        layer(torch.randn(2, channels, 9, 13))
    sampling = recording[0].sampling
    pairs = adjacent_taps(sampling.grid[0, 0, :, 0, 0])
    return effective_dilation(sampling.locations, pairs)


@pytest.mark.parametrize("dilation", [1, 2, 4, (2, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_offsets_it_is_the_dilation(family: str, dilation: int | tuple[int, int]) -> None:
    layer = FAMILIES[family](32, 32, 3, padding=4, dilation=dilation, stride=2)
    result = dilation_of(layer)
    assert result.dtype == torch.float64 and result.ndim == 4 and result.numel() > 8
    expected = 2.5 if dilation == (2, 3) else dilation  # as many pairs lie across as upright
    assert (result == expected).all()


def test_any_kernel() -> None:
    """Three upright pairs at a distance of 2 and four across at a distance of 3."""
    layer = DeformConv2dPack(8, 8, (2, 3), padding=4, dilation=(2, 3))
    assert (dilation_of(layer, 8) == (3 * 2 + 4 * 3) / 7).all()
    assert (dilation_of(DeformConv2dPack(8, 8, (3, 1), dilation=(2, 3)), 8) == 2).all()
    assert (dilation_of(DCNv3(32, 32, 3, group=2, offset_scale=2.0)) == 2).all()


def square(step: float = 1.0) -> Tensor:
    """A kernel of 3x3, row by row, around (20, 10)."""
    y, x = torch.meshgrid(*[torch.arange(-1, 2)] * 2, indexing="ij")
    return torch.stack([20 + step * x, 10 + step * y], -1).flatten(0, 1)


def test_pairs_by_hand() -> None:
    rows = [(0, 1), (1, 2), (3, 4), (4, 5), (6, 7), (7, 8)]
    columns = [(0, 3), (3, 6), (1, 4), (4, 7), (2, 5), (5, 8)]

    def pairs(grid: Tensor) -> set[tuple[int, ...]]:
        found = [tuple(pair) for pair in adjacent_taps(grid).tolist()]
        assert len(found) == len(set(found))
        return set(found)

    assert pairs(square()) == pairs(square(0.3)) == {*rows, *columns}
    by_column = square().unflatten(0, (3, 3)).transpose(0, 1).flatten(0, 1)
    assert pairs(by_column) == {*rows, *columns}
    ring = [tap for tap in range(9) if tap != 4]
    outer = {(0, 1), (1, 2), (5, 6), (6, 7), (0, 3), (3, 5), (2, 4), (4, 7)}
    assert pairs(square()[ring]) == outer
    assert pairs(square()[:1]) == set()


def single(points: Tensor, scale: tuple[float, float] = (1, 1)) -> float:
    """Of one filter of 3x3."""
    return float(
        effective_dilation(points[None, None, :, None, None], adjacent_taps(square()), scale)
    )


def test_dilation_by_hand() -> None:
    assert single(square(2.5)) == 2.5
    assert single(square(), (2, 3)) == 2.5
    assert single(torch.stack([20 + (square()[:, 0] - 20) * 4, square()[:, 1]], -1)) == 2.5
    moved = square()
    moved[0] += torch.tensor([3.0, 4.0])
    # From its neighbours, which are (1, 0) and (0, 1) from where it was, it is (2, 4) and (3, 3).
    assert single(moved) == pytest.approx(
        (10 + math.hypot(2, 4) + math.hypot(3, 3)) / 12, rel=1e-12
    )
    moved = square()
    moved[4] += torch.tensor([0.0, 0.5])
    expected = (8 + 2 * math.hypot(1, 0.5) + 1.5 + 0.5) / 12
    assert single(moved) == pytest.approx(expected, rel=1e-12)


def test_moving_or_turning_a_filter_changes_nothing() -> None:
    points = square().double() + torch.randn(9, 2, dtype=torch.float64)
    before = single(points)
    assert single(points + torch.tensor([-7.25, 31.5])) == pytest.approx(before, rel=1e-12)
    assert single(points @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]]).double()) == pytest.approx(
        before, rel=1e-6
    )


def test_classes_by_hand() -> None:
    boxes = np.array(
        [
            [10.0, 10, 50, 50],
            [20, 20, 40, 45],
            [60, 0, 92, 32],
            [100, 100, 196, 196],
            [0, 90, 150, 150],
        ]
    )  # areas 1600, 500, 32^2, 96^2, 9000
    ignored = np.array([False] * 4 + [True])

    def name(x: float, y: float, **options: Any) -> str:
        point = np.array([[x, y]]) - 0.5  # boxes count from the edge of a pixel
        index = int(object_classes(point, boxes, ignored, **options)[0])
        return "left out" if index < 0 else CLASSES[index]

    assert name(15, 15) == "medium" and name(30, 30) == "small" and name(30, 48) == "medium"
    assert name(61, 1) == "medium" and name(110, 190) == "large"  # the limits are the next size
    assert name(10, 10) == "medium" and name(9.99, 10) == "background"
    assert name(49.99, 10) == "medium" and name(50, 10) == name(10, 50) == "background"
    assert name(5, 100) == "left out" and name(110, 110) == "large"  # ignored, an object in front
    assert name(15, 15, sizes=(41, 50)) == "small" and name(15, 15, sizes=(10, 40)) == "large"
    points = np.zeros((3, 2))
    assert object_classes(points, np.zeros((0, 4))).tolist() == [CLASSES.index("background")] * 3
    order = np.array([4, 1, 0, 3, 2])
    grid = np.stack(np.meshgrid(np.arange(0, 200, 7), np.arange(0, 200, 7)), -1).reshape(-1, 2)
    assert np.array_equal(
        object_classes(grid, boxes, ignored), object_classes(grid, boxes[order], ignored[order])
    )


def test_portions_give_what_all_give() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=1000) + 1e4
    spread = Spread()
    assert (spread.count, spread.mean, spread.std) == (0, 0, 0)
    for portion in np.split(values, [0, 1, 7, 400, 400, 999]):
        spread.add(portion)
    assert spread.count == 1000
    assert spread.mean == pytest.approx(values.mean(), rel=1e-13)
    assert spread.std == pytest.approx(values.std(), rel=1e-9)


def test_a_layer_over_images() -> None:
    rng = np.random.default_rng(1)
    row, parts = LayerDilation("layer", 0, 1.0), []
    for count, stride in ((5, (4.0, 8.0)), (0, (4.0, 8.0)), (7, (7.0, 8.0))):
        values, classes = rng.random((2, count)), rng.integers(-1, 4, count)
        row.add(values, 3 * values, classes, stride)
        parts.append((values, classes))
    values, classes = (np.concatenate(part, -1) for part in zip(*parts, strict=True))
    assert row.images == 3 and row.stride == (5, 8) and len(row.groups) == 2
    assert set(range(-1, 4)) == set(classes)
    for index, name in enumerate(CLASSES):
        chosen = values[:, classes == index]
        for spread, expected in (
            (row.classes[name], chosen.mean(0)),
            (row.in_image[name], 3 * chosen.mean(0)),
            (row.groups[0][name], chosen[0]),
            (row.groups[1][name], chosen[1]),
        ):
            assert spread.count == len(expected) > 0
            assert (spread.mean, spread.std) == pytest.approx((expected.mean(), expected.std()))


class Stretched(nn.Module):
    """Filters of the pixel in row i and column j are stretched by 1 + i + 10 j, twice in group 1.

    Images of 20 x 12 are enlarged to 40 x 24, padded to 48 x 32 and averaged over 4 x 4 pixels;
    a second call of the layer sees the map of half the size.
    """

    def __init__(self) -> None:
        super().__init__()
        pipeline = [
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=(40, 24), keep_ratio=True),
            dict(type="PackDetInputs", meta_keys=("scale_factor",)),
        ]
        self.cfg = Config(dict(test_dataloader=dict(dataset=dict(pipeline=pipeline))))
        self.stem, self.pool = nn.AvgPool2d(4), nn.AvgPool2d(2)
        self.layer = DeformConv2d(4, 4, 3, padding=1, deform_groups=2)
        self.copies, self.shift = 1, 0.0
        self.eval()

    def test_step(self, batch: dict) -> None:
        images = nn.functional.pad(batch["inputs"][0][None].float(), (0, 8, 0, 8))
        self(images)

    def forward(self, inputs: Tensor) -> None:
        self.graph = torch.is_grad_enabled()
        stem = self.stem(inputs[:, [0, 0, 1, 2]]).expand(self.copies, -1, -1, -1)
        for map in (stem, self.pool(stem)):
            stretch = 1 + stretches(*map.shape[2:])
            taps = (square() - torch.tensor([20, 10])).flip(-1).flatten()  # (y, x)
            offsets = [taps[:, None, None] * (stretch * (group + 1) - 1) for group in range(2)]
            self.layer(map, torch.cat(offsets).expand(len(map), -1, -1, -1) + self.shift)


def stretches(height: int, width: int) -> Tensor:
    return torch.arange(height)[:, None] + 10.0 * torch.arange(width)


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """An image with four objects, one of them ignored."""
    path = tmp_path_factory.mktemp("dilation") / "image.png"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (12, 20, 3), np.uint8))
    boxes = {(3, 1, 7, 5): 0, (2, 0, 12, 8): 0, (14, 0, 20, 5): 0, (10, 6, 20, 12): 1}
    instances = [dict(bbox=list(box), ignore_flag=flag) for box, flag in boxes.items()]
    return dict(img_path=str(path), instances=instances)


@pytest.fixture
def model() -> Stretched:
    init_default_scope("mmdet")
    return Stretched()


def test_filters_are_where_they_are_in_the_image(model: Stretched, info: dict) -> None:
    measured = EffectiveDilation(model, sizes=(5, 8.5))
    measured.add_image(info)
    assert not model.graph
    assert measured.names == ["layer"] and measured.objects == dict(small=1, medium=1, large=1)
    first, second = measured.rows()
    assert (first.layer, first.call, second.call) == ("layer", 0, 1)
    assert first.stride == (2, 2) and second.stride == (4, 4)
    assert first.regular == second.regular == 1

    # Pixel (j, i) has its centre at (2 j + 1, 2 i + 1) as boxes count; 10 x 6 of 12 x 8 are inside.
    def outputs(columns: range, rows: range) -> set[tuple[int, int]]:
        return {(i, j) for i in rows for j in columns}

    small = outputs(range(1, 3), range(2))
    medium = outputs(range(7, 10), range(2))
    large = outputs(range(1, 6), range(4)) - small
    left_out = outputs(range(5, 10), range(3, 6)) - large
    background = outputs(range(10), range(6)) - small - medium - large - left_out
    stretch = 1 + stretches(8, 12).numpy()
    for name, pixels in zip(CLASSES, (small, medium, large, background), strict=True):
        expected = np.array([stretch[pixel] for pixel in sorted(pixels)])
        for spread, factor in (
            (first.classes[name], 1.5),
            (first.in_image[name], 3),
            (first.groups[0][name], 1),
            (first.groups[1][name], 2),
        ):
            assert spread.count == len(pixels)
            assert spread.mean == pytest.approx(factor * expected.mean(), rel=1e-6)
            assert spread.std == pytest.approx(factor * expected.std(), rel=1e-5)
    assert sum(spread.count for spread in second.classes.values()) == 15 - 5  # 5 are ignored


def test_images_add_up(model: Stretched, info: dict) -> None:
    measured = EffectiveDilation(model, "lay*")
    for _ in range(3):
        measured.add_image(info)
    once = EffectiveDilation(model)
    once.add_image(dict(info, instances=[dict(bbox=[0, 0, 20, 12])]))
    row, whole = measured.rows()[0], once.rows()[0]
    assert row.images == 3 and row.stride == (2, 2) and measured.objects["small"] == 9
    assert row.classes["background"].count == 3 * 20 and row.classes["small"].count == 3 * 26
    assert whole.classes["small"].count == 60 and not whole.classes["background"].count
    values = 1.5 * (1 + stretches(6, 10).numpy())
    assert whole.classes["small"].std == pytest.approx(values.std(), rel=1e-6)


def test_what_cannot_be_measured(model: Stretched, info: dict) -> None:
    measured = EffectiveDilation(model)
    model.copies = 2
    with pytest.raises(ValueError, match="layers: layer reads maps of RoIs"):
        measured.add_image(info)
    model.copies, model.shift = 1, float("nan")
    with pytest.raises(ValueError, match=r"offsets of layer are not finite on .*image\.png"):
        measured.add_image(info)
    with pytest.raises(ValueError, match=r"nowhere\.png is no image"):
        measured.add_image(dict(info, img_path="nowhere.png"))
    model.train()
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        measured.add_image(info)
    assert not measured.rows() and not any(measured.objects.values())
    assert not any(module._forward_hooks for module in model.modules())
    for sizes in ((96, 32), (32, 32), (0, 32)):
        with pytest.raises(
            ValueError, match=rf"sizes must be positive and increase, got {sizes[0]}"
        ):
            EffectiveDilation(model, sizes=sizes)


def test_models_without_deformable_convolutions() -> None:
    layers = dict(
        attention=MultiScaleDeformableAttention(8, 1, num_levels=1),
        dat=DeformableAttention2d(8, 1, kernel_size=3),
        points=DeformConv2d(4, 4, 1),
        conv=DeformConv2d(4, 4, 3),
    )
    model = nn.ModuleDict(layers)
    assert EffectiveDilation(model).names == ["conv"]
    with pytest.raises(ValueError, match=r"larger than 1x1, got 'a\*', which matches MultiScale"):
        EffectiveDilation(model, "a*")
    with pytest.raises(ValueError, match=r"which matches DeformConv2d alone"):
        EffectiveDilation(model, ["points"])
    with pytest.raises(ValueError, match="'neck' matches no deformable layer"):
        EffectiveDilation(model, "neck")
    with pytest.raises(ValueError, match="Conv2d has no deformable layer"):
        EffectiveDilation(nn.Conv2d(3, 3, 3))

"""Effective dilation by hand, and exactly the dilation where nothing has moved."""

from pathlib import Path

import mmcv.ops
import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("mmdet")
from mmdeform.analysis.dilation import (
    CLASSES,
    LayerDilation,
    adjacent_taps,
    classify_filters,
    effective_dilation,
    measure_dilation,
)
from mmdeform.analysis.recording import record
from mmdeform.layers import (
    DCNv3,
    DCNv4,
    DeformableAttention2d,
    DeformConv2dPack,
    ModulatedDeformConv2dPack,
)


def grid(rows: int, columns: int, dilation: tuple[float, float] = (1, 1)) -> torch.Tensor:
    """Taps (x, y) row by row; ``dilation`` is (vertical, horizontal)."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([x * dilation[1], y * dilation[0]], -1).flatten(0, 1).float()


def test_neighbours_of_a_kernel() -> None:
    pairs = adjacent_taps(grid(3, 3))
    assert len(pairs) == 12
    expected = {(0, 1), (1, 2), (3, 4), (4, 5), (6, 7), (7, 8)}  # along rows
    expected |= {(0, 3), (3, 6), (1, 4), (4, 7), (2, 5), (5, 8)}
    assert {tuple(pair) for pair in pairs.tolist()} == expected
    assert adjacent_taps(grid(1, 3)).tolist() == [[0, 1], [1, 2]]
    assert len(adjacent_taps(grid(5, 2, (3, 2)))) == 5 + 8
    assert len(adjacent_taps(grid(1, 1))) == 0

    order = torch.randperm(9)
    shuffled = {tuple(sorted(order[pair].tolist())) for pair in adjacent_taps(grid(3, 3)[order])}
    assert shuffled == expected
    ring = torch.cat([grid(3, 3)[:4], grid(3, 3)[5:]])
    assert len(adjacent_taps(ring)) == 8  # without its centre


@pytest.mark.parametrize(
    "make",
    [
        lambda **kwargs: DeformConv2dPack(4, 4, **kwargs),
        lambda **kwargs: ModulatedDeformConv2dPack(4, 4, deform_groups=2, **kwargs),
        lambda **kwargs: mmcv.ops.DeformConv2dPack(4, 4, **kwargs),
        lambda **kwargs: mmcv.ops.ModulatedDeformConv2dPack(4, 4, **kwargs),
        lambda **kwargs: DCNv3(4, 4, group=2, **kwargs),
        lambda **kwargs: DCNv4(4, 4, group=1, **kwargs),
    ],
    ids=["v1", "v2", "mmcv v1", "mmcv v2", "v3", "v4"],
)
@pytest.mark.parametrize("dilation, expected", [(1, 1.0), (2, 2.0), (4, 4.0), ((2, 3), 2.5)])
def test_without_offsets_it_is_the_dilation(make, dilation, expected: float) -> None:
    layer = make(kernel_size=3, padding=dilation, dilation=dilation, stride=2)
    with record(layer) as recording:
        layer(torch.randn(1, 4, 19, 17))
    sampling = recording[""].sampling
    pairs = adjacent_taps(sampling.grid[0, 0, :, 0, 0])
    found = effective_dilation(sampling.locations, pairs)
    assert found.shape[2:] == (10, 9) and (found == expected).all()


def test_moved_taps_by_hand() -> None:
    pairs = adjacent_taps(grid(3, 3))
    regular = grid(3, 3)
    scaled = 2.5 * regular + torch.tensor([7.0, -3.0])
    corner = regular.clone()
    corner[0] -= torch.tensor([3.0, 3.0])  # its neighbours are now sqrt(4^2 + 3^2) = 5 away
    locations = torch.stack([regular, scaled, corner])[None, :, :, None, None]
    found = effective_dilation(locations, pairs).flatten()
    assert found.tolist() == pytest.approx([1.0, 2.5, (10 + 5 + 5) / 12])


def test_filters_belong_to_the_smallest_box_they_are_in() -> None:
    boxes = [[0, 0, 200, 200], [10, 10, 42, 42], [100, 100, 131, 131], [150, 150, 246, 246]]
    centers = np.array(
        [
            (5, 5),  # in the large one alone
            (20, 20),  # 32 x 32 is medium already
            (110, 110),  # small, inside of the large one
            (9.5, 9.5),  # the very corner of the medium one
            (9.4, 20),  # just outside of it
            (41.5, 20),  # its right edge is outside
            (220, 220),  # 96 x 96 is large
            (300, 20),
        ]
    )
    names = [CLASSES[index] for index in classify_filters(centers, boxes)]
    assert names == [
        "large", "medium", "small", "medium", "large", "large", "large", "background",
    ]  # fmt: skip
    names = [CLASSES[index] for index in classify_filters(centers, boxes, sizes=(10, 300))]
    assert names == ["medium"] * 7 + ["background"]
    crowd = [[290, 10, 310, 30], [105, 105, 115, 115]]
    assert classify_filters(centers, boxes, ignored=np.array(crowd)).tolist()[-1] == -1
    assert CLASSES[classify_filters(centers, boxes, ignored=np.array(crowd))[2]] == "small"
    assert classify_filters(centers, np.zeros((0, 4))).tolist() == [3] * 8


def test_sums_are_those_of_all_filters() -> None:
    rng = np.random.default_rng(0)
    layer = LayerDilation("layer", 1.0, 8.0, *(np.zeros((2, 4)) for _ in range(3)))
    seen: list[list[list[np.ndarray]]] = [[[] for _ in CLASSES] for _ in range(2)]
    for _ in range(3):
        dilations, classes = rng.uniform(1, 5, (2, 50)), rng.integers(-1, 3, 50)
        layer.add(dilations, classes)
        for group in range(2):
            for index in range(4):
                seen[group][index].append(dilations[group, classes == index])
    for index in range(3):
        each = [np.concatenate(seen[group][index]) for group in range(2)]
        assert layer.mean()[index] == pytest.approx(np.concatenate(each).mean())
        assert layer.std()[index] == pytest.approx(np.concatenate(each).std())
        assert layer.mean(1)[index] == pytest.approx(each[1].mean())
        assert layer.std(0)[index] == pytest.approx(each[0].std())
        assert layer.count[0, index] == len(each[0])
    assert np.isnan(layer.mean()[3]) and layer.count[:, 3].tolist() == [0, 0]


class Spread(nn.Module):
    """A detector whose only filters spread by a known factor, on maps of half the image's size."""

    def __init__(self, cfg) -> None:
        super().__init__()
        self.cfg = cfg
        self.stem = nn.Conv2d(3, 2, 1, stride=2)
        self.spread = ModulatedDeformConv2dPack(2, 2, 3, padding=1)
        bias = self.spread.conv_offset.bias.data[:18].view(9, 2)  # (y, x)
        bias.copy_(0.5 * (grid(3, 3).flip(-1) - 1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.spread(self.stem(inputs))

    def test_step(self, batch: dict) -> None:
        padded = nn.functional.pad(batch["inputs"][0][None].float(), (0, 8, 0, 8))
        self(inputs=padded)


class Images:
    def __init__(self, path: Path) -> None:
        box = dict(bbox=[8, 4, 24, 20], ignore_flag=False)
        crowd = dict(bbox=[0, 0, 4, 4], ignore_flag=True)
        self.info = dict(img_path=str(path), instances=[box, crowd])

    def __len__(self) -> int:
        return 2

    def get_data_info(self, index: int) -> dict:
        return self.info


@pytest.fixture
def scene(tmp_path: Path) -> tuple[Spread, Images]:
    import cv2
    from mmengine import Config

    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="Resize", scale=(64, 48), keep_ratio=True),
        dict(type="mmdet.PackDetInputs", meta_keys=("scale_factor",)),
    ]
    cfg = Config(dict(test_dataloader=dict(dataset=dict(pipeline=pipeline))))
    cv2.imwrite(str(tmp_path / "image.png"), np.zeros((24, 32, 3), np.uint8))
    return Spread(cfg), Images(tmp_path / "image.png")


def test_over_a_data_set(scene: tuple[Spread, Images]) -> None:
    for seen, found in measure_dilation(*scene, sizes=(16, 40)):
        layer = found["spread"]
        # A map pixel is a pixel of the image, which was enlarged twice; padding does not count.
        assert layer.count.tolist() == [[0, seen * 16 * 16, 0, seen * (24 * 32 - 16 * 16 - 4 * 4)]]
    assert seen == 2 and list(found) == ["spread"]
    assert layer.regular == 1 and layer.stride == 2
    assert layer.mean()[[1, 3]].tolist() == pytest.approx([1.5, 1.5])
    assert layer.std()[[1, 3]].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert [seen for seen, _ in measure_dilation(*scene, images=1)] == [1]


def test_maps_of_rois_are_passed_over(scene: tuple[Spread, Images]) -> None:
    model, images = scene
    model.of_rois = ModulatedDeformConv2dPack(2, 2, 3, padding=1)
    model.stem.register_forward_hook(
        lambda stem, args, output: model.of_rois(torch.zeros(4, 2, 7, 7)).sum() * 0 + output
    )
    *_, (_, found) = measure_dilation(model, images)
    assert list(found) == ["spread"]


def test_misuse(scene: tuple[Spread, Images]) -> None:
    model, images = scene
    with pytest.raises(ValueError, match=r"sizes must be two numbers.*got \(96, 32\)"):
        next(measure_dilation(model, images, sizes=(96, 32)))
    with pytest.raises(ValueError, match="at least one image, got 0"):
        next(measure_dilation(model, images, images=0))
    with pytest.raises(ValueError, match="'neck' matches no deformable layer"):
        next(measure_dilation(model, images, layers="neck"))
    model.spread.conv_offset.bias.data[3] = float("nan")
    with pytest.raises(ValueError, match="offsets of spread are NaN or infinite"):
        next(measure_dilation(model, images))
    for other in (DeformableAttention2d(2, 1), ModulatedDeformConv2dPack(2, 2, 1)):
        model.spread = other
        with pytest.raises(ValueError, match=r"'\*\*' matches no deformable convolution with"):
            next(measure_dilation(model, images))

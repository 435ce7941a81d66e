"""Blocks of a DAT are found, and their recorded keys and attention are those of the layers."""

import pytest
import torch
from torch import nn

pytest.importorskip("mmcv")
from mmdeform.analysis.dat import deformable_blocks, find_block
from mmdeform.analysis.recording import KeysCall, calls, record
from mmdeform.layers import DeformableAttention2d
from mmdeform.models import DAT


def small_dat(version: str = "v1", **settings) -> DAT:
    """Stages 3 and 4 have deformable blocks, two groups of keys in a fifth of the full width."""
    defaults = dict(
        stem_dims=8,
        dims=(8, 8, 16, 16),
        num_heads=(1, 1, 4, 4),
        num_groups=(1, 1, 2, 2),
        stage_specs=("L", "L", "DLD", "D"),
        strides=1,
    )
    return DAT("tiny", version, img_size=64, **{**defaults, **settings}).eval()


def recorded(model: nn.Module, images: torch.Tensor, stage: int = 3, block: int = -1) -> KeysCall:
    name = find_block(deformable_blocks(model), stage, block)
    with torch.no_grad(), record(model, name) as recording:
        model(images)
    assert recording.names == [name]
    return recording[name]


IMAGES = torch.linspace(-1, 1, 2 * 3 * 64 * 96).sin().view(2, 3, 64, 96)


@pytest.mark.parametrize(
    ("version", "stage", "stride", "first"),
    [("v1", 3, 16, 7.5), ("v1", 4, 32, 15.5), ("pp", 3, 16, 0), ("pp", 4, 32, 0)],
)
def test_corners_of_the_map_lie_at_the_centres_of_its_corner_pixels(
    version: str, stage: int, stride: int, first: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Group 0: first, last and middle; group 1: (y, x) apart.
    positions = [[[-1, -1], [1, 1], [0, 0]], [[-1, 1], [0.5, -0.5], [1, -1]]]
    positions = torch.tensor(positions, dtype=torch.float)[None, :, None]
    model = small_dat(version)
    name = deformable_blocks(model)[stage][-1]
    # What the layer computes stays as it is: only the record is told these positions.
    layer = model.get_submodule(name)
    forward = DeformableAttention2d.forward

    def with_true_positions(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.delattr(layer, "predict_positions")
            return forward(self, x)

    monkeypatch.setattr(
        layer, "predict_positions", lambda x: (positions, -positions), raising=False
    )
    monkeypatch.setattr(DeformableAttention2d, "forward", with_true_positions)
    size = 5 * stride, 9 * stride
    with torch.no_grad(), record(model, name) as recording:
        model(torch.zeros(1, 3, *size))
    keys = recording[name]
    assert keys.map_size == (5, 9)
    right, bottom = first + 8 * stride, first + 4 * stride
    middle_x, middle_y = first + 4 * stride, first + 2 * stride
    expected = [
        [[first, first], [right, bottom], [middle_x, middle_y]],
        [[right, first], [first + 2 * stride, first + 3 * stride], [first, bottom]],
    ]
    torch.testing.assert_close(keys.locations[:, :, 0], torch.tensor([expected]).float())
    opposite = [
        [[right, bottom], [first, first], [middle_x, middle_y]],
        [[first, bottom], [first + 6 * stride, first + stride], [right, first]],
    ]
    torch.testing.assert_close(keys.grid[:, :, 0], torch.tensor([opposite]).float())


@pytest.mark.parametrize("version", ["v1", "pp"])
@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_a_query_is_centred_in_the_pixels_that_it_is_made_of(version: str, stage: int) -> None:
    model = small_dat(version, stage_specs="D")
    keys = recorded(model, torch.zeros(1, 3, 128, 192), stage)
    image = torch.rand(1, 3, 128, 192, requires_grad=True)
    map = model.patch_proj(image)
    for index in range(stage - 1):
        map = model.down_projs[index](model.stages[index].proj(map))
    height, width = map.shape[2:]
    row, column = height // 2, width // 2
    (gradient,) = torch.autograd.grad(map[0, 0, row, column], image)
    rows, columns = gradient[0].abs().sum(0).nonzero().unbind(1)
    # Windows of odd kernels reach as far to the left as to the right of the centre.
    centre = [(float(axis.min()) + float(axis.max())) / 2 for axis in (columns, rows)]
    assert keys.centers()[row * width + column].tolist() == centre


@pytest.mark.parametrize("version", ["v1", "pp"])
def test_queries_and_positions(version: str) -> None:
    keys = recorded(small_dat(version), IMAGES)
    assert keys.map_size == (4, 6)
    centers = keys.centers().tolist()
    for query, (x, y) in enumerate(centers):
        assert keys.nearest(x + 7.9, y - 7.9) == query  # half of the stride is 8
    assert keys.nearest(centers[0][0] + 8.1, centers[0][1]) == 1
    assert keys.nearest(centers[0][0], centers[0][1] + 8.1) == 6
    assert keys.nearest(-100, -100) == 0 and keys.nearest(1000, 1000) == 23
    assert keys.nearest(-100, 1000) == 18


def test_reference_points_are_the_regular_grid() -> None:
    model = small_dat("v1")
    for attention in (model.stages[2].attns[0], model.stages[2].attns[2]):
        nn.init.zeros_(attention.conv_offset[3].weight)
    keys = recorded(model, IMAGES)
    assert keys.locations.shape == (2, 2, 4, 6, 2)
    torch.testing.assert_close(keys.locations, keys.grid.expand_as(keys.locations))
    # v1 spaces N points evenly, half a step from the borders of [-1, 1], over N - 1 steps.
    x = [7.5 + 16 * (i + 0.5) / 6 * 5 for i in range(6)]
    y = [7.5 + 16 * (i + 0.5) / 4 * 3 for i in range(4)]
    expected = torch.tensor([[[column, row] for column in x] for row in y])
    torch.testing.assert_close(keys.locations[1, 1], expected)


def test_keys_are_those_of_the_layer() -> None:
    model = small_dat("v1")
    keys = recorded(model, IMAGES)
    assert keys.name == "stages.2.attns.2" and keys.layer is model.stages[2].attns[2]
    with torch.no_grad():
        positions, _ = keys.layer.predict_positions(keys.inputs["x"])
    y, x = positions[1, 1, 2, 3]
    torch.testing.assert_close(keys.locations[1, 1, 2, 3, 0], 7.5 + 16 * (x + 1) / 2 * 5)
    torch.testing.assert_close(keys.locations[1, 1, 2, 3, 1], 7.5 + 16 * (y + 1) / 2 * 3)
    moved = (keys.locations - keys.grid).abs().amax((0, 1, 2, 3))
    assert (moved > 0.1).all()


@pytest.mark.parametrize("limit", [1, 4 * 24 * 5, 1 << 22])
def test_attention_is_averaged_in_chunks(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = recorded(small_dat(), IMAGES)
    with torch.no_grad():
        weights = keys.layer.attention(keys.inputs["x"], torch.arange(24))  # (B, M, HW, Ns)
    sizes = []
    attention = keys.layer.attention

    def counted(x: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        sizes.append(len(queries))
        return attention(x, queries)

    monkeypatch.setattr(keys.layer, "attention", counted)
    monkeypatch.setattr(calls, "MAX_WEIGHTS", limit)
    average = keys.attention(torch.arange(24), image=1)
    assert sum(sizes) == 24 and max(sizes) == min(24, max(1, limit // (4 * 24)))
    torch.testing.assert_close(average, weights[1].mean(1))
    torch.testing.assert_close(average.sum(1), torch.ones(4))
    torch.testing.assert_close(keys.attention(torch.tensor([7])), weights[0, :, 7])
    assert (average - keys.attention(torch.tensor([7]))).abs().max() > 1e-6


def test_blocks_are_found_by_stage() -> None:
    names = {3: ["stages.2.attns.0", "stages.2.attns.2"], 4: ["stages.3.attns.0"]}
    assert deformable_blocks(small_dat()) == names
    assert find_block(names, 3) == "stages.2.attns.2"
    assert find_block(names, 3, 0) == find_block(names, 3, -2) == "stages.2.attns.0"


def test_blocks_that_do_not_exist_are_refused() -> None:
    blocks = deformable_blocks(small_dat())
    there = "2 in stage 3, 1 in stage 4"
    with pytest.raises(ValueError, match=f"stage 2 has no deformable block; there are {there}"):
        find_block(blocks, 2)
    for block in (2, -3):
        message = f"between -2 and 1 in stage 3, but got {block}; deformable blocks: {there}"
        with pytest.raises(ValueError, match=message):
            find_block(blocks, 3, block)


@pytest.mark.parametrize("model", [nn.Linear(1, 1), small_dat(stage_specs="L")])
def test_models_without_deformable_attention_are_refused(model: nn.Module) -> None:
    message = f"{type(model).__name__} has no block with deformable attention"
    with pytest.raises(ValueError, match=message):
        deformable_blocks(model)


def test_a_dat_may_be_a_part_but_not_twice() -> None:
    inner = small_dat()
    model = nn.ModuleDict(dict(backbone=inner))
    name = find_block(deformable_blocks(model), 4)
    assert name == "backbone.stages.3.attns.0"
    with pytest.raises(ValueError, match=r"several DATs, first\., second\.; give one"):
        deformable_blocks(nn.ModuleDict(dict(first=small_dat(), second=small_dat())))

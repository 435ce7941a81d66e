"""Recorded keys are where the layers read, and their attention is that of the layers."""

import pytest
import torch
from torch import nn

pytest.importorskip("mmcv")
from mmdeform.analysis import dat
from mmdeform.analysis.dat import LayerKeys, deformable_blocks, find_block, record_keys
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


def recorded(model: nn.Module, images: torch.Tensor, stage: int = 3, block: int = -1) -> LayerKeys:
    name = find_block(deformable_blocks(model), stage, block)
    with record_keys(model, [name]) as record:
        model(images)
    assert list(record) == [name]
    return record[name]


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
    monkeypatch.setattr(
        DeformableAttention2d, "predict_positions", lambda self, x: (positions, -positions)
    )
    model = small_dat(version)
    name = deformable_blocks(model)[stage][-1]
    with record_keys(model, [name]) as record:
        model.get_submodule(name)(torch.rand(1, 16, 5, 9))  # the rest of the model is not needed
    keys = record[name]
    assert keys.stride == (stride, stride) and keys.first == (first, first)
    right, bottom = first + 8 * stride, first + 4 * stride
    middle_x, middle_y = first + 4 * stride, first + 2 * stride
    expected = [
        [[first, first], [right, bottom], [middle_x, middle_y]],
        [[right, first], [first + 2 * stride, first + 3 * stride], [first, bottom]],
    ]
    torch.testing.assert_close(keys.points, torch.tensor([expected], dtype=torch.float))
    opposite = [
        [[right, bottom], [first, first], [middle_x, middle_y]],
        [[first, bottom], [first + 6 * stride, first + stride], [right, first]],
    ]
    torch.testing.assert_close(keys.reference, torch.tensor([opposite], dtype=torch.float))


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
    assert list(keys.position_of(row * width + column)) == centre


@pytest.mark.parametrize("version", ["v1", "pp"])
def test_queries_and_positions(version: str) -> None:
    keys = recorded(small_dat(version), IMAGES)
    height, width = keys.input.shape[2:]
    assert (height, width) == (4, 6)
    for query in range(24):
        x, y = keys.position_of(query)
        assert keys.query_at(x, y) == query
        assert keys.query_at(x + 7.9, y - 7.9) == query  # half of the stride is 8
    assert keys.query_at(keys.first[0] + 8.1, keys.first[1]) == 1
    assert keys.query_at(keys.first[0], keys.first[1] + 8.1) == 6
    assert keys.query_at(-100, -100) == 0 and keys.query_at(1000, 1000) == 23
    assert keys.query_at(-100, 1000) == 18
    # Centres in the left 3 columns and the upper 2 rows, whichever way pixels are centred.
    assert keys.queries_within(40.6, 24.6) == [0, 1, 2, 6, 7, 8]
    assert keys.queries_within(keys.first[0] + 32.4, keys.first[1] + 16.4) == [0, 1]
    assert keys.queries_within(keys.first[0] + 32.6, keys.first[1] + 16.4) == [0, 1, 2]
    assert keys.queries_within(96, 64) == list(range(24))


def test_reference_points_are_the_regular_grid() -> None:
    model = small_dat("v1")
    for attention in (model.stages[2].attns[0], model.stages[2].attns[2]):
        nn.init.zeros_(attention.conv_offset[3].weight)
    keys = recorded(model, IMAGES)
    assert keys.points.shape == (2, 2, 24, 2)
    torch.testing.assert_close(keys.points, keys.reference.expand_as(keys.points))
    # v1 spaces N points evenly, half a step from the borders of [-1, 1], over N - 1 steps.
    x = [7.5 + 16 * (i + 0.5) / 6 * 5 for i in range(6)]
    y = [7.5 + 16 * (i + 0.5) / 4 * 3 for i in range(4)]
    expected = torch.tensor([[column, row] for row in y for column in x])
    torch.testing.assert_close(keys.points[1, 1], expected)


def test_keys_are_those_of_the_layer() -> None:
    model = small_dat("v1")
    keys = recorded(model, IMAGES)
    assert keys.name == "stages.2.attns.2" and keys.layer is model.stages[2].attns[2]
    positions, _ = keys.layer.predict_positions(keys.input)
    y, x = positions[1, 1, 2, 3]
    torch.testing.assert_close(keys.points[1, 1, 2 * 6 + 3, 0], 7.5 + 16 * (x + 1) / 2 * 5)
    torch.testing.assert_close(keys.points[1, 1, 2 * 6 + 3, 1], 7.5 + 16 * (y + 1) / 2 * 3)
    moved = (keys.points - keys.reference).abs().amax((0, 1, 2))
    assert (moved > 0.1).all()


@pytest.mark.parametrize("limit", [1, 4 * 24 * 5, 1 << 22])
def test_attention_is_averaged_in_chunks(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = recorded(small_dat(), IMAGES)
    weights = keys.layer.attention(keys.input, torch.arange(24))  # (B, M, HW, Ns)
    sizes = []
    attention = keys.layer.attention

    def counted(x: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        sizes.append(len(queries))
        return attention(x, queries)

    monkeypatch.setattr(keys.layer, "attention", counted)
    monkeypatch.setattr(dat, "MAX_WEIGHTS", limit)
    average = keys.attention(range(24), image=1)
    assert sum(sizes) == 24 and max(sizes) == min(24, max(1, limit // (4 * 24)))
    torch.testing.assert_close(average, weights[1].mean(1))
    torch.testing.assert_close(average.sum(1), torch.ones(4))
    torch.testing.assert_close(keys.attention([7]), weights[0, :, 7])
    assert (average - keys.attention([7])).abs().max() > 1e-6


def test_attention_needs_a_query() -> None:
    with pytest.raises(ValueError, match="queries must hold at least one index, but is empty"):
        recorded(small_dat(), IMAGES).attention([])


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
    with record_keys(model, [name]) as record:
        inner(IMAGES)
    torch.testing.assert_close(record[name].points, recorded(inner, IMAGES, stage=4).points)
    with pytest.raises(ValueError, match=r"several DATs, first\., second\.; give one"):
        deformable_blocks(nn.ModuleDict(dict(first=small_dat(), second=small_dat())))


def test_hooks_are_removed_also_after_an_error() -> None:
    model = small_dat()
    with (
        pytest.raises(RuntimeError, match="stop"),
        record_keys(model, ["stages.2.attns.0"]) as record,
    ):
        raise RuntimeError("stop")
    model(IMAGES)
    assert record == {}

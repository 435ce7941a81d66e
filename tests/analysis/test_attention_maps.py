"""Maps of attention lie where the keys and samples of a query are."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("mmcv")
from mmdeform.analysis.attention import Attention, attended
from mmdeform.analysis.attention.maps import (
    Samples,
    cell_size,
    dense_map,
    samples_of,
    splat,
)
from mmdeform.analysis.attention.views import ImageView
from mmdeform.layers import DeformableAttention2d, MultiScaleDeformableAttention
from mmdeform.ops import ms_deform_attn

C, M = 4, 2
SIZE = (48, 32)  # width, height of the input
MAPS = ((6, 4), (3, 2), (2, 1))  # strides 8, 16 and 32; the last reaches beyond the input


@pytest.mark.parametrize(
    ("size", "map_size", "expected"),
    [
        ((160, 160), (10, 10), (16, 16)),
        ((1333, 800), (42, 25), (32, 32)),
        ((1333, 800), (84, 50), (16, 16)),
        ((5, 3), (5, 3), (1, 1)),
        ((90, 64), (4, 1), (22.5, 64)),
    ],
)
def test_pixels_of_a_map_in_pixels_of_the_input(size, map_size, expected) -> None:
    assert cell_size(size, map_size) == expected


def dense(weights: Tensor) -> Attention:
    """One image, weights of shape (M, Lq, Nk)."""
    return Attention(
        kind="dense",
        self_attention=True,
        batch=1,
        heads=weights.shape[0],
        queries=weights.shape[1],
        keys=weights.shape[2],
        weigh=lambda queries: weights[None, :, queries],
    )


def test_map_of_dense_attention() -> None:
    weights = torch.rand(M, 5, 6).softmax(-1)
    found = dense_map(dense(weights), 3, SIZE, MAPS)
    assert found.cell == (16, 16)
    assert torch.equal(found.weights, weights[:, 3].view(M, 2, 3))
    with pytest.raises(ValueError, match=r"of a map of \(\(6, 4\), .*\), got 5 keys"):
        dense_map(dense(weights[..., :5]), 0, SIZE, MAPS)


def deformable_call(levels=MAPS, queries: int = 3) -> Attention:
    """Attention of a layer whose samples lie all over the maps, some of them outside."""
    layer = MultiScaleDeformableAttention(
        C, M, num_levels=len(levels), num_points=3, batch_first=True
    )
    torch.nn.init.normal_(layer.sampling_offsets.weight, std=0.5)
    torch.nn.init.normal_(layer.attention_weights.weight)
    shapes = torch.tensor([(height, width) for width, height in levels])
    inputs = dict(
        query=torch.randn(1, queries, C),
        value=torch.randn(1, sum(w * h for w, h in levels), C),
        reference_points=torch.rand(1, queries, len(levels), 2),
        spatial_shapes=shapes,
        level_start_index=torch.tensor([0, *shapes.prod(1).cumsum(0)[:-1]]),
    )
    return attended(layer, (), inputs)


def read_weights(attention: Attention, levels, query: int) -> list[Tensor]:
    """How much each pixel of each level counts in the operator's output, (M, H, W) for each."""
    sampling = attention.sampling
    tokens = [w * h for w, h in levels]
    value = torch.ones(1, sum(tokens), M, 1, requires_grad=True)
    locations = (sampling.locations + 0.5) / sampling.size
    shapes = torch.tensor([(h, w) for w, h in levels])
    starts = torch.tensor([0, *shapes.prod(1).cumsum(0)[:-1]])
    output = ms_deform_attn(value, shapes, starts, locations, sampling.mask)  # (1, Lq, M)
    (gradient,) = torch.autograd.grad(output[0, query].sum(), value)
    parts = gradient[0, :, :, 0].T.split(tokens, 1)
    return [part.reshape(M, h, w) for part, (w, h) in zip(parts, levels, strict=True)]


@pytest.mark.parametrize("level", MAPS)
def test_samples_are_spread_as_they_are_read(level: tuple[int, int]) -> None:
    attention = deformable_call((level,))
    for query in range(3):
        found = splat(samples_of(attention, query), SIZE, (level,))
        (expected,) = read_weights(attention, (level,), query)
        torch.testing.assert_close(found.weights, expected)
        assert found.cell == cell_size(SIZE, level)
        assert 0 < found.weights.sum() < M


def test_coarse_maps_are_spread_over_the_grid_of_the_finest() -> None:
    attention = deformable_call()
    found = splat(samples_of(attention, 1), SIZE, MAPS)
    fine, middle, coarse = read_weights(attention, MAPS, 1)
    expected = fine + middle.repeat_interleave(2, 1).repeat_interleave(2, 2) / 4
    # 2 x 1 pixels of 32 x 32; the second reaches 16 pixels beyond the input's 48.
    expected += torch.cat(
        [coarse[:, :, :1].expand(M, 4, 4) / 16, coarse[:, :, 1:].expand(M, 4, 2) / 8], 2
    )
    torch.testing.assert_close(found.weights, expected)
    assert found.weights.shape == (M, 4, 6) and found.cell == (8, 8)
    total = sum(float(level.sum()) for level in (fine, middle, coarse))
    assert float(found.weights.sum()) == pytest.approx(total)


def test_samples_in_the_input() -> None:
    samples = Samples(
        points=torch.tensor([[[0.0, 0], [2, 1]], [[0.5, -0.5], [1, 0]]]),
        sizes=torch.tensor([[[6.0, 4], [3, 2]], [[3, 2], [2, 1]]]),
        weights=torch.full((2, 2), 0.5),
    )
    expected = [[[4.0, 4], [40, 24]], [[16, 0], [48, 16]]]
    assert samples.in_input(SIZE).tolist() == expected


def test_samples_of_a_query() -> None:
    attention = deformable_call()
    samples = samples_of(attention, 2)
    assert samples.points.shape == samples.sizes.shape == (M, 9, 2)
    torch.testing.assert_close(samples.points, attention.sampling.locations[0, 2].flatten(1, 2))
    assert samples.sizes[0].tolist() == [list(size) for size in MAPS for _ in range(3)]
    torch.testing.assert_close(samples.weights.sum(1), torch.ones(M))
    with pytest.raises(ValueError, match="expected deformable attention, got dense"):
        samples_of(dense(torch.ones(1, 1, 1)), 0)
    with pytest.raises(ValueError, match="expected deformable attention, got dense"):
        samples_of(attended(DeformableAttention2d(C, M), (torch.randn(1, C, 4, 4),)), 0)


BOXES = [(0, 0, 10, 10), (1, 0, 11, 10), (20, 20, 40, 30), (0, 0, 30, 30)]
SCORES = [(0.1, 0.7), (0.8, 0.2), (0.3, 0.1), (0.2, 0.25)]


@pytest.fixture
def view() -> ImageView:
    deformable = deformable_call(queries=32)
    tokens = sum(w * h for w, h in MAPS)
    return ImageView(
        size=SIZE,
        map_sizes=MAPS,
        attentions={
            "encoder.layers.0.self_attn": dense(torch.ones(M, tokens, tokens) / tokens),
            "encoder.layers.1.self_attn": replace(deformable, self_attention=True),
            "decoder.layers.0.self_attn": dense(torch.ones(M, 4, 4) / 4),
            "decoder.layers.0.cross_attn": deformable,
            "decoder.layers.1.cross_attn": deformable,
        },
        scores=torch.tensor(SCORES),
        boxes=torch.tensor(BOXES, dtype=torch.float),
    )


def test_predictions_of_queries(view: ImageView) -> None:
    found = view.prediction(1)
    assert (found.query, found.label, found.box) == (1, 0, (1, 0, 11, 10))
    assert found.score == pytest.approx(0.8)
    # The first query predicts the same object as the second one.
    assert [found.query for found in view.best_predictions(3)] == [1, 2, 3]
    assert [found.query for found in view.best_predictions(9)] == [1, 2, 3]
    assert [found.query for found in view.best_predictions(1)] == [1]


def test_query_that_predicts_an_object_best(view: ImageView) -> None:
    assert view.prediction_at((0, 0, 10, 10), 0).query == 1  # 0.8 * 90 / 110 against 0.1
    assert view.prediction_at((0, 0, 10, 10), 1).query == 0
    assert view.prediction_at((18, 20, 40, 30), 1).query == 2
    found = view.prediction_at((0, 0, 28, 28), 0)
    assert (found.query, found.label) == (3, 1)  # its own best class


@pytest.mark.parametrize(
    ("x", "y", "level", "query"),
    [(0, 0, 0, 0), (7.9, 7.9, 0, 0), (8, 0, 0, 1), (47.9, 31.9, 0, 23), (16, 16, 1, 24 + 4)],
)
def test_query_of_a_pixel(view: ImageView, x, y, level: int, query: int) -> None:
    assert view.pixel_query(x, y, level) == query


def test_queries_and_layers_that_do_not_exist(view: ImageView) -> None:
    with pytest.raises(ValueError, match="level must be below 3, but got 3"):
        view.pixel_query(0, 0, 3)
    with pytest.raises(ValueError, match=r"\(48, 0\) is not in the 48 x 32 input"):
        view.pixel_query(48, 0)
    assert view.last_layer("encoder self") == "encoder.layers.1.self_attn"
    assert view.last_layer("decoder cross") == "decoder.layers.1.cross_attn"
    with pytest.raises(ValueError, match="for 'backbone' attention, got encoder self, decoder"):
        view.last_layer("backbone")


def test_maps_of_a_view(view: ImageView) -> None:
    found = view.attention_map("decoder.layers.1.cross_attn", 1)
    expected = splat(view.samples("decoder.layers.1.cross_attn", 1), SIZE, MAPS)
    assert torch.equal(found.weights, expected.weights)
    with pytest.raises(ValueError, match=r"pixels of a map .* got 32 keys"):
        view.attention_map("encoder.layers.0.self_attn", 0)

"""Pictures show keys where they are in the image, as large as the attention that they get."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("mmdet")
from matplotlib.figure import Figure

from mmdeform.analysis.detectors import Picture
from mmdeform.analysis.drawing import KeysPanel, assemble, choose_keys, keys_panel
from mmdeform.analysis.drawing.canvas import PANEL
from mmdeform.analysis.drawing.keys import COVERED, LARGEST, queries_within, weights_of_keys
from mmdeform.analysis.recording import KeysCall, PixelGrid
from mmdeform.analysis.scene import Scene


class Layer:
    """Four heads in two groups; the first query attends to the first key, the others to all."""

    num_heads = 4

    def attention(self, x: Tensor, queries: Tensor) -> Tensor:
        first = torch.tensor([[1.0, 0, 0], [0.6, 0.2, 0.2], [0, 0.5, 0.5], [0, 0.25, 0.75]])
        return torch.stack([torch.full((4, 3), 1 / 3) if q else first for q in queries], 1)[None]


POINTS = torch.tensor([[[8.0, 8], [24, 8], [40, 56]], [[10.0, 12], [30, 14], [50, 18]]])
MAP = PixelGrid((16.0, 16.0), (7.5, 7.5))
FIRST = torch.tensor([0])


@pytest.fixture
def keys() -> KeysCall:
    """Two groups of a row of three keys for a map of 6 x 4 queries."""
    locations = POINTS[None, :, None]
    inputs = dict(x=torch.zeros(1, 16, 4, 6))
    return KeysCall(
        "layer", Layer(), inputs, None, (96, 64), locations, locations[:, :1] - 2, map_grid=MAP
    )


def picture_of(width: int, height: int, scale: tuple[float, float]) -> Picture:
    return Picture(Path("image.png"), np.zeros((height, width, 3), np.uint8), {}, scale)


PICTURE = picture_of(60, 30, (1.5, 2.0))
PIXELS = (POINTS.view(-1, 2).numpy() + 0.5) / (1.5, 2.0) - 0.5  # the points in the picture
SHARES = np.array([0.8, 0.1, 0.1, 0, 0.375, 0.625]) / 0.8


def panel_of(points: np.ndarray, weights: np.ndarray, query: np.ndarray | None = None) -> KeysPanel:
    return KeysPanel(
        title="title", pixels=PICTURE.pixels, layer="layer", points=points, references=points - 1,
        weights=weights, groups=np.zeros(len(points), int), query=query,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("head", "group", "groups", "weights"),
    [
        (None, None, [0, 1], [[0.8, 0.1, 0.1], [0, 0.375, 0.625]]),
        (None, 1, [1], [[0, 0.375, 0.625]]),
        (1, None, [0], [[0.6, 0.2, 0.2]]),
        (2, None, [1], [[0, 0.5, 0.5]]),
    ],
)
def test_weights_of_heads_and_groups(
    keys: KeysCall, head: int | None, group: int | None, groups: list[int], weights: list
) -> None:
    chosen, found = weights_of_keys(keys, FIRST, head, group)
    assert chosen == groups
    torch.testing.assert_close(found, torch.tensor(weights))


def test_groups_have_neighbouring_heads(keys: KeysCall, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.rand(6, 1, 3)
    monkeypatch.setattr(Layer, "attention", lambda self, x, queries: weights[None])
    monkeypatch.setattr(Layer, "num_heads", 6)
    for head, group in enumerate([0, 0, 0, 1, 1, 1]):
        chosen, found = weights_of_keys(keys, FIRST, head, None)
        assert chosen == [group] and torch.equal(found, weights[head])


@pytest.mark.parametrize(("name", "count"), [("head", 4), ("group", 2)])
@pytest.mark.parametrize("beyond", [-1, 0])
def test_heads_and_groups_that_do_not_exist_are_refused(
    keys: KeysCall, name: str, count: int, beyond: int
) -> None:
    index = count if beyond == 0 else -1
    message = f"{name} must be between 0 and {count - 1} in layer, but got {index}"
    with pytest.raises(ValueError, match=message):
        weights_of_keys(keys, FIRST, **{"head": None, "group": None, name: index})


def test_what_a_panel_shows(keys: KeysCall) -> None:
    panel = keys_panel(PICTURE, keys, (5.9, 0.2), "here")  # the first query reaches to 10.2, 7.2
    assert panel.title == "here, largest = 2.4 x mean" and panel.layer == "layer"
    np.testing.assert_allclose(panel.points, PIXELS)
    references = (POINTS[0].numpy() - 2 + 0.5) / (1.5, 2.0) - 0.5  # those of both groups
    np.testing.assert_allclose(panel.references, [*references, *references])
    np.testing.assert_allclose(panel.shares, SHARES, rtol=1e-6)
    np.testing.assert_allclose(panel.query, (8 / 1.5 - 0.5, 8 / 2 - 0.5))
    assert panel.groups.tolist() == [0] * 3 + [1] * 3
    next_one = keys_panel(PICTURE, keys, (12, 0.2), "next")  # at 18.25, 0.9 of the inputs
    np.testing.assert_allclose(next_one.query, (24 / 1.5 - 0.5, 8 / 2 - 0.5))
    assert next_one.title.endswith("largest = 1 x mean")
    one = keys_panel(PICTURE, keys, (5.9, 0.2), "one", group=1)
    np.testing.assert_allclose(one.points, PIXELS[3:])
    np.testing.assert_allclose(one.shares, [0, 0.6, 1])
    numbers = one.numbers()
    assert numbers["groups"] == [1] * 3 and numbers["weights"] == [0, 0.375, 0.625]
    np.testing.assert_allclose(numbers["points"], PIXELS[3:], atol=0.006)


@pytest.mark.parametrize(("padding", "queries"), [(0, 24), (24, 16)])
def test_all_queries_of_the_image_are_averaged(keys: KeysCall, padding: int, queries: int) -> None:
    picture = picture_of(64 - padding * 2 // 3, 32, (96 / 64, 2.0))
    assert len(queries_within(picture, keys)) == queries
    panel = keys_panel(picture, keys, None, "mean")
    # One query attends as in `Layer`, all others to a third of everything.
    mean = (0.8 + (queries - 1) / 3) / queries
    assert panel.title == f"mean, largest = {3 * mean:.3g} x mean"
    assert panel.query is None
    assert panel.shares[1] == pytest.approx((0.1 + (queries - 1) / 3) / queries / mean)


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("query", [None, np.array([5.0, 7.0])])
def test_what_is_drawn(offsets: bool, query: np.ndarray | None) -> None:
    axis = Figure().add_subplot()
    panel = dataclasses.replace(panel_of(PIXELS, SHARES / 2, query), offsets=offsets, largest=80)
    panel.draw(axis)
    drawn = list(axis.collections)
    if offsets:
        starts, ends = np.stack(drawn.pop(0).get_segments(), 1)
        np.testing.assert_allclose(starts, PIXELS - 1)
        np.testing.assert_allclose(ends, PIXELS)
    if query is not None:
        np.testing.assert_allclose(drawn.pop().get_offsets(), [query])
    dots, circles = drawn
    np.testing.assert_allclose(dots.get_offsets(), PIXELS)
    order = [0, 5, 4, 1, 2, 3]  # small ones on top
    np.testing.assert_allclose(circles.get_offsets(), PIXELS[order])
    np.testing.assert_allclose(circles.get_sizes(), 80 * SHARES[order])
    np.testing.assert_allclose(circles.get_array(), SHARES[order])
    assert circles.get_clim() == (0, 1)
    assert axis.get_xlim() == (-0.5, 59.5) and axis.get_ylim() == (29.5, -0.5)
    assert axis.get_title() == "title"
    legend = list(KeysPanel.legend([panel]))
    assert ("offset" in legend) == offsets and ("query" in legend) == (query is not None)


@pytest.mark.parametrize("count", [1, 10, 10000])
def test_circles_leave_room(count: int) -> None:
    few = panel_of(PIXELS[:1], np.full(1, 0.3))
    many = panel_of(np.ones((count, 2)), np.full(count, 0.1))
    areas = [panel.largest for panel in KeysPanel.fitted([few, many], 3.0)]
    assert areas[0] == areas[1]  # sizes of one picture can be compared
    room = COVERED * (3.0 * 72) ** 2 / 2  # panels are twice as wide as high
    assert areas[0] == pytest.approx(min(LARGEST, room / count))
    assert (areas[0] == LARGEST) == (count < 100)
    assert KeysPanel.fitted([many])[0].largest == pytest.approx(
        min(LARGEST, room / count * (PANEL / 3) ** 2)
    )


def test_figures_have_circles_that_leave_room() -> None:
    many = panel_of(np.ones((10000, 2)), np.full(10000, 0.1))
    (axis,) = assemble([[many]]).axes
    circles = axis.collections[1]
    assert circles.get_sizes()[0] == pytest.approx(KeysPanel.fitted([many])[0].largest)


def test_the_layer_that_is_shown(scenes: dict[str, Scene]) -> None:
    (call,) = scenes["detr"].calls("keys")
    assert choose_keys([call]) is call
    grids = [PixelGrid((s, s)) for s in (8.0, 16.0, 16.0, 32.0)]
    calls = [SimpleNamespace(map_grid=grid) for grid in grids]
    assert choose_keys(calls) is calls[2]
    assert choose_keys(calls[3:] + calls[3:]) is calls[3]

"""Panels show what the layers really sample, in pixels of the image.

The image is resized to twice its size for the network: position p of the image is 2p + 0.5 there.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("mmdet")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from mmdeform.analysis.detections import Place
from mmdeform.analysis.drawing import (
    AttentionPanel,
    ConvolutionPanel,
    DetectionsPanel,
    Look,
    RoIPoolingPanel,
    assemble,
    attention_panel,
    choose_attention,
    choose_pooling,
    choose_stack,
    convolution_panel,
    draw,
    panels_of,
    roi_pooling_panel,
    to_rgb,
)
from mmdeform.analysis.recording import record
from mmdeform.analysis.scene import Scene
from mmdeform.analysis.tracing import trace_points
from mmdeform.layers import DeformConv2dPack, DeformPSRoIPoolPack

from ..all_kinds import DETECTORS, HEIGHT, WIDTH

PLACE = Place("there", (40, 30))


def in_image(points: torch.Tensor) -> np.ndarray:
    return ((points.double() - 0.5) / 2).numpy()


def axis_of(panel: object) -> plt.Axes:
    axis = Figure().add_subplot()
    panel.draw(axis)
    return axis


def test_convolutions(scenes: dict[str, Scene]) -> None:
    scene = scenes["two_stage"]
    calls = scene.calls("convolution")[:2]
    panel = convolution_panel(scene, calls, PLACE, group=1)
    points, weights = trace_points(calls, 80.5, 60.5, group=1)
    np.testing.assert_allclose(panel.points, in_image(points))
    np.testing.assert_allclose(panel.weights, weights)
    regular, _ = trace_points(calls, 80.5, 60.5, offsets=False)
    np.testing.assert_allclose(panel.regular, in_image(regular))
    assert panel.position == (40 - 0.25, 32 - 0.25)  # the output at (80, 64) of stride 16
    assert panel.layers == ["backbone.layer3.0.conv2", "backbone.layer3.1.conv2"]

    regular, sampled = axis_of(panel).collections
    order = np.argsort(panel.weights)  # the heaviest on top
    np.testing.assert_allclose(sampled.get_offsets(), panel.points[order])
    np.testing.assert_allclose(sampled.get_array(), panel.weights[order] / panel.weights.max())
    assert len(regular.get_offsets()) == 25  # of 81 those that differ
    numbers = panel.numbers()
    assert numbers["group"] == 1 and len(numbers["points"]) == len(numbers["weights"]) == 81
    scale = ConvolutionPanel.color_scale([panel])
    assert scale.label.startswith("product of the modulations of 2 layers")


def test_version_1_has_no_weights_to_explain(scenes: dict[str, Scene]) -> None:
    with record(model := DeformConv2dPack(3, 3, 3, padding=1)) as recording:
        model(torch.randn(1, 3, 128, 192))
    panel = convolution_panel(scenes["two_stage"], recording, PLACE)
    assert (panel.weights == 1).all() and ConvolutionPanel.color_scale([panel]) is None


def stack(*strides: int, name: str = "backbone.layer", size: int = 320, kernel: int = 3) -> list:
    def grid(stride: int) -> SimpleNamespace:
        return SimpleNamespace(stride=(float(stride), float(stride)))

    layer = SimpleNamespace(kernel_size=(kernel, kernel), dilation=(1, 1))
    return [
        SimpleNamespace(
            name=f"{name}{index}", output_grid=grid(stride), map_grid=grid(stride), layer=layer,
            image_size=(size, 2 * size),
        )
        for index, stride in enumerate(strides)
    ]  # fmt: skip


def test_the_stack_that_is_shown() -> None:
    calls = stack(8, 8, 8, 8, 16, 16, 16, 32, 32, 32)
    chosen = choose_stack(calls, 3)  # 3 * 16 is less than a fifth of 320, 3 * 32 is not
    assert chosen == calls[4:7]
    assert choose_stack(calls, 2) == calls[8:]  # 2 * 32 is a fifth
    assert choose_stack(calls[:4], 3) == calls[1:4]
    assert choose_stack(calls, 1) == calls[9:]
    assert choose_stack(stack(64, 64, 32), 2)[0].name == "backbone.layer2"  # the finest
    dilated = stack(8, 8, 16, 16)
    assert choose_stack(dilated, 2) == dilated[2:]
    for call in dilated[2:]:
        call.layer = SimpleNamespace(kernel_size=(3, 3), dilation=(3, 3))
    assert choose_stack(dilated, 2) == dilated[:2]
    # Branches of a head run beside each other; those of a backbone go first.
    head = stack(8, 8, 16, name="bbox_head.conv")
    assert choose_stack(head, 3) == head[2:]
    assert choose_stack(head[:2], 3) == head[1:2]
    assert choose_stack(calls + head, 3) == calls[4:7]


def test_depth_and_chosen_layers(scenes: dict[str, Scene]) -> None:
    scene = scenes["two_stage"]
    overview = DetectionsPanel.of(scene)

    def layers(**look: object) -> list[str]:
        (row,) = panels_of("convolution", scene, [PLACE], overview, Look(**look))
        return row.panels[1].layers

    names = [f"backbone.layer{i}.{j}.conv2" for i in (3, 4) for j in (0, 1)]
    assert layers(chosen=True) == names[1:] and layers(chosen=True, depth=4) == names
    assert layers(depth=1) == names[3:] or layers(depth=1) == names[1:2]
    with pytest.raises(ValueError, match=r"between 1 and the number .* 4, but got 5; chosen: back"):
        layers(chosen=True, depth=5)
    with pytest.raises(ValueError, match="depth must be at least 1, but got 0"):
        layers(depth=0)


def test_roi_pooling(scenes: dict[str, Scene]) -> None:
    scene = scenes["two_stage"]
    calls = choose_pooling(scene.calls("roi_pooling"))
    assert {call.name[:-1] for call in calls} == {"roi_head.bbox_roi_extractor.roi_layers."}
    call = calls[-1]
    for index in (0, len(call.rois) - 1):
        roi = call.rois[index, 1:].numpy() / 2
        place = Place("there", PLACE.position, roi + 0.01, label=1)
        panel = roi_pooling_panel(scene, calls, place)
        np.testing.assert_allclose(panel.roi, roi, rtol=1e-5)
        assert panel.layer == call.name and panel.group == 0
        np.testing.assert_allclose(
            panel.centers, in_image(call.locations[index].flatten(0, 1)), atol=1e-3
        )
        np.testing.assert_allclose(
            panel.regular, in_image(call.grid[index].flatten(0, 1)), atol=1e-3
        )
        np.testing.assert_allclose(panel.weights, call.weights[index].flatten(), rtol=1e-5)
        np.testing.assert_allclose(panel.bin_size, (roi[2:] - roi[:2]) / 3, rtol=1e-4)
        assert np.abs(panel.centers - panel.regular).max() > 0.1
    nearest = roi_pooling_panel(scene, calls, PLACE)
    centers = np.concatenate([call.rois[:, 1:].view(-1, 2, 2).mean(1).numpy() for call in calls])
    distance = np.linalg.norm(centers / 2 - 0.5 - PLACE.position, axis=1).min()
    middle = nearest.roi.reshape(2, 2).mean(0) - 0.5
    assert np.linalg.norm(middle - PLACE.position) == pytest.approx(distance, abs=0.3)


def test_the_pooling_that_is_shown() -> None:
    def calls(*names: str) -> list:
        return [SimpleNamespace(name=name) for name in names]

    box_and_mask = calls("box.layers.0", "box.layers.2", "mask.layers.0", "box.layers.0")
    assert choose_pooling(box_and_mask) == [*box_and_mask[:2], box_and_mask[3]]
    votes = calls("head.fc_cls.pool", "head.fc_reg.pool")
    assert choose_pooling(votes) == votes[:1]


def test_what_is_drawn_of_bins(scenes: dict[str, Scene]) -> None:
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    panel = RoIPoolingPanel(
        title="", pixels=pixels, layer="pool", roi=np.array([40.0, 20, 48, 24]), group=0,
        centers=np.array([[41.5, 21.5], [45.5, 30]]),
        regular=np.array([[41.5, 21.5], [45.5, 21.5]]),
        bin_size=np.array([4.0, 4]), weights=np.array([0.25, 0.5]),
    )  # fmt: skip
    axis = axis_of(panel)
    regular, lines, bins, _ = axis.collections
    corners = bins.get_paths()[1].vertices[:4]
    assert corners.tolist() == [[43.5, 28], [47.5, 28], [47.5, 32], [43.5, 32]]
    assert regular.get_paths()[1].vertices[0].tolist() == [43.5, 19.5]
    assert lines.get_segments()[1].tolist() == [[45.5, 21.5], [45.5, 30]]
    assert bins.get_facecolor()[:, 3].tolist() == pytest.approx([0.2, 0.4])  # as opaque as masks
    assert axis.patches[0].get_bbox().bounds == (39.5, 19.5, 8, 4)
    left, right = axis.get_xlim()
    bottom, top = axis.get_ylim()
    assert right - left == pytest.approx(WIDTH * 0.3) and bottom - top == pytest.approx(
        HEIGHT * 0.3
    )
    assert left < 39.5 and right > 48 and top < 19.5 and bottom > 32


def test_position_sensitive_bins_of_a_class(scenes: dict[str, Scene]) -> None:
    layer = DeformPSRoIPoolPack(3, 2, 1.0, output_channels=3, num_classes=3, group_size=1)
    nn.init.normal_(layer.conv_offset.weight)
    rois = torch.tensor([[0, 20.0, 10, 59, 49]])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = layer

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.pool(images, rois, images)

    with record(model := Model()) as recording:
        model(torch.randn(1, 3, 128, 192))
    scene = scenes["two_stage"]
    call = recording["pool"]
    for label, group in ((0, 0), (1, 1), (None, 2)):  # the background is the last
        panel = roi_pooling_panel(scene, [call], Place("there", (20, 15), label=label))
        assert panel.group == group and panel.weights is None
        moved = (call.sampling.offset[0, group] * 40).flatten(0, 1) / 2  # rounded corners + 1
        np.testing.assert_allclose(panel.centers - panel.regular, moved, atol=1e-4)
        size = np.array([39, 39]) / 2 / 2
        start = np.array([20, 10]) / 2 - 0.5
        np.testing.assert_allclose(panel.regular[0], start + size / 2, atol=1e-4)
        np.testing.assert_allclose(panel.regular[1], start + size * (1.5, 0.5), atol=1e-4)


def test_attention_of_the_encoder(scenes: dict[str, Scene]) -> None:
    scene = scenes["detr"]
    encoder, decoder = choose_attention(scene.calls("attention"))
    assert (encoder.name, decoder.name) == (
        "encoder.layers.0.self_attn",
        "decoder.layers.1.cross_attn",
    )
    panel = attention_panel(scene, encoder, PLACE)
    query = 3 * 12 + 5  # (80, 60) of pixels of 16 x 16 in the finest level
    assert panel.query == query and panel.box is None
    np.testing.assert_allclose(panel.reference, ((5.5 * 16 - 1) / 2, (3.5 * 16 - 1) / 2), atol=1e-4)
    np.testing.assert_allclose(panel.points, in_image(encoder.locations[0, query].flatten(0, 2)))
    assert panel.weights.sum() == pytest.approx(2)  # of two heads
    assert panel.heads.tolist() == [0] * 8 + [1] * 8
    assert panel.levels.tolist() == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4
    one = attention_panel(scene, encoder, PLACE, head=1)
    np.testing.assert_allclose(one.points, panel.points[8:])
    assert one.weights.sum() == pytest.approx(1) and set(one.heads) == {1}
    with pytest.raises(ValueError, match="head must be between 0 and 1 in encoder"):
        attention_panel(scene, encoder, PLACE, head=2)
    assert panel.strides.tolist() == [[16, 16], [32, 32]]
    assert list(AttentionPanel.legend([panel])) == [
        "level of stride 16",
        "level of stride 32",
        "reference point",
    ]


def test_attention_of_the_decoder(scenes: dict[str, Scene]) -> None:
    scene = scenes["detr"]
    (*_, decoder) = scene.calls("attention")
    for detection in scene.detections():
        panel = attention_panel(scene, decoder, Place.of(detection))
        np.testing.assert_allclose(panel.box, detection.box, atol=1e-3)
        np.testing.assert_allclose(scene.query_boxes[panel.query], detection.box, atol=1e-3)
        locations = decoder.locations[0, panel.query].flatten(0, 2)
        np.testing.assert_allclose(panel.points, in_image(locations))
    chosen = attention_panel(scene, decoder, Place("query 7", PLACE.position, query=7))
    assert chosen.query == 7
    with pytest.raises(ValueError, match="query must be between 0 and 11 in decoder"):
        attention_panel(scene, decoder, Place("query 12", PLACE.position, query=12))
    reference = in_image(decoder.centers())
    nearest = attention_panel(scene, decoder, PLACE)
    distances = np.linalg.norm(reference - PLACE.position, axis=1)
    assert nearest.query == distances.argmin()


def test_what_is_drawn_of_attention(scenes: dict[str, Scene]) -> None:
    scene = scenes["detr"]
    panel = attention_panel(scene, scene.calls("attention")[0], PLACE)
    samples, _, reference = axis_of(panel).collections
    order = np.argsort(panel.weights)
    np.testing.assert_allclose(samples.get_offsets(), panel.points[order])
    sizes = samples.get_sizes()
    assert sizes.tolist() == sorted(sizes) and sizes[-1] > 2 * sizes[0]
    outlines = {}
    for path, level in zip(samples.get_paths(), panel.levels[order], strict=True):
        outlines.setdefault(int(level), set()).add(len(path.vertices))
    assert len(outlines[0]) == len(outlines[1]) == 1 and outlines[0] != outlines[1]
    np.testing.assert_allclose(reference.get_offsets(), [panel.reference])


@pytest.mark.parametrize("name", DETECTORS)
def test_figures_of_all_kinds(name: str, scenes: dict[str, Scene]) -> None:
    scene = scenes[name]
    places = [PLACE, Place("corner", (3, 60))]
    for kind in scene.kinds:
        rows = panels_of(kind, scene, places, DetectionsPanel.of(scene, 0.3), objects=[PLACE])
        assert len(rows) == (2 if kind == "attention" else 1)
        assert [row.places for row in rows][-1] == (
            [PLACE] if kind in ("attention", "roi_pooling") else places
        )
        figure = draw(rows)
        image = to_rgb(figure, 40)
        assert image.dtype == np.uint8 and image.shape[2] == 3 and np.ptp(image) > 200
        columns = max(len(row.panels) for row in rows)
        assert image.shape[1] == pytest.approx(40 * 3.2 * columns, abs=1)
        numbers = json.loads(json.dumps([row.numbers() for row in rows]))
        assert numbers[0]["image"].endswith("1.png") and numbers[0]["size"] == [WIDTH, HEIGHT]
        assert numbers[-1]["panels"][0]["place"]["position"] == [40, 30]
    assert plt.get_fignums() == []


def test_rows_may_differ_in_length_and_size(scenes: dict[str, Scene]) -> None:
    scene = scenes["two_stage"]
    overview = DetectionsPanel.of(scene)
    wide = convolution_panel(scene, scene.calls("convolution")[:1], PLACE)
    tall = DetectionsPanel(title="tall", pixels=np.zeros((60, 30, 3), np.uint8), found=[])
    figure = assemble([[overview, wide, wide], [tall, wide]])
    axes = [axis for axis in figure.axes if axis.images]
    assert len(axes) == 5
    assert [axis.axison for axis in figure.axes[:6]] == [True] * 5 + [False]
    width, height = figure.get_size_inches()
    assert width == pytest.approx(3 * 3.2) and height > 3.2 * (2 / 3 + 2)


def test_detections_are_drawn(scenes: dict[str, Scene]) -> None:
    scene = scenes["two_stage"]
    panel = DetectionsPanel.of(scene, 0.0)
    axis = axis_of(panel)
    assert len(axis.patches) == len(axis.texts) == len(scene.detections()) > 0
    left, top, width, height = axis.patches[0].get_bbox().bounds
    x1, y1, x2, y2 = panel.found[0].box - 0.5
    assert (left, top, left + width, top + height) == pytest.approx((x1, y1, x2, y2))
    assert panel.numbers()["detections"][0]["name"] == panel.found[0].name

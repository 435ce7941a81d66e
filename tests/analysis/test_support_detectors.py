"""Nodes of detectors respond as the detectors themselves do, and these stay as they are."""

import pytest
import torch

pytest.importorskip("mmdet")
from mmdet.structures.bbox import bbox2roi

from mmdeform.analysis.detectors import load_detector, load_picture, preprocess
from mmdeform.analysis.support import (
    effective_sampling,
    output_gradients,
    query_node,
    query_of,
    query_outputs,
    roi_node,
    saliency_region,
)
from mmdeform.analysis.support.choosing import choose_detection, choose_feature, choose_query

from .support_detectors import write

BOX = (22.0, 11.0, 61.0, 47.0)


@pytest.fixture(scope="module", params=["faster", "rfcn", "transformer", "one"])
def every(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    return load(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def faster(tmp_path_factory: pytest.TempPathFactory):
    return load("faster", tmp_path_factory)


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory):
    return load("transformer", tmp_path_factory)


LOADED: dict[str, tuple] = {}


def load(kind: str, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """The kind, a detector, and a picture."""
    if kind not in LOADED:
        paths = write(tmp_path_factory.mktemp(kind), kind)
        model = load_detector(paths["config"], paths["checkpoint"])
        LOADED[kind] = (kind, model, load_picture(model, paths["image"]))
    return LOADED[kind]


@pytest.fixture(scope="module", autouse=True)
def forget():
    yield
    LOADED.clear()


def test_a_detector_stays_as_it_is(every: tuple) -> None:
    kind, model, picture = every

    def state() -> list:
        (result,) = model.test_step(picture.batch)
        found = result.pred_instances
        return [
            found.scores, found.bboxes, found.labels, *model.state_dict().values(),
            torch.get_rng_state(),
        ]  # fmt: skip

    before = [tensor.clone() for tensor in state()]
    if kind == "one":
        with pytest.raises(ValueError, match="of RetinaNet come from no single query or box"):
            choose_detection(model, picture)
        choice = choose_feature(model, picture, 40, 25, "neck", 1)
    else:
        choice = choose_detection(model, picture, 1)
        assert choice.detection["index"] == 1 and choice.detection["class"] in "disc ring pair 3 4"
    layers = effective_sampling(choice.node, choice.images, projections=2)
    assert layers and all(layer.norms.max() > 0 for layer in layers)
    for layer in layers:
        assert layer.norms.shape == layer.call.locations.shape[:-1]
    kinds = {layer.call.kind for layer in layers}
    assert (
        kinds
        == {
            "faster": {"convolution", "roi_pooling"},
            "rfcn": {"roi_pooling"},
            "transformer": {"attention"},
            "one": {"convolution"},
        }[kind]
    )
    region = saliency_region(choice.node, choice.images, choice.size, cell=16, passes=40)
    assert not region.mask[60:].any() and not region.mask[:, 90:].any()  # padding
    after = state()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_features_of_a_box(faster: tuple) -> None:
    _, model, picture = faster
    images, (sample,) = preprocess(model, picture)
    node = roi_node(model, sample, BOX)
    assert node.position == (41, 28.5) and node.box == BOX
    pair = torch.cat([images, images.flip(3)])
    with torch.no_grad():
        head = model.roi_head
        maps = model.extract_feat(pair)[: head.bbox_roi_extractor.num_inputs]
        features = head.bbox_roi_extractor(maps, bbox2roi([torch.tensor([BOX])] * 2)).flatten(1)
        first, second = head.bbox_head.shared_fcs
        torch.testing.assert_close(node.respond(pair), second(first(features).relu()))
    (pooling,) = [
        layer
        for layer in effective_sampling(node, images, projections=1)
        if layer.call.kind == "roi_pooling"
    ]
    assert pooling.norms.shape == (1, 7, 7)
    for box in ((10, 10, 10, 20), (10, 30, 20, 20)):
        with pytest.raises(ValueError, match="x1 < x2 and y1 < y2, got"):
            roi_node(model, sample, box)
    with pytest.raises(ValueError, match="FasterRCNN is no detection transformer"):
        query_node(model, sample, images, 0)


def test_a_pixel_of_a_map(faster: tuple) -> None:
    _, model, picture = faster
    choice = choose_feature(model, picture, 40, 25, "neck", 1)
    x, y = picture.to_inputs((40, 25))
    assert abs(choice.node.position[0] - x) <= 4 and abs(choice.node.position[1] - y) <= 4
    column, row = (round(position / 8) for position in choice.node.position)
    with torch.no_grad():
        expected = model.extract_feat(choice.images)[1][:, :, row, column]
    torch.testing.assert_close(choice.node.respond(choice.images).detach(), expected)
    assert f"pixel ({column}, {row}) of neck, output 1" == choice.node.name
    last = choose_feature(model, picture, 40, 25)  # of the backbone, stride 32
    assert last.node.name.endswith("of backbone, output 3")
    with pytest.raises(ValueError, match=r"75 pixels wide and 50 high, got \(80, 10\)"):
        choose_feature(model, picture, 80, 10)
    with pytest.raises(ValueError, match="neck returned 4 tensors, so that it has no output 7"):
        choose_feature(model, picture, 40, 25, "neck", 7)
    with pytest.raises(ValueError, match=r"detection must be from 0 to .*, got 1000"):
        choose_detection(model, picture, 1000)


def test_queries(transformer: tuple) -> None:
    _, model, picture = transformer
    images, (sample,) = preprocess(model, picture)
    caught: list = []
    handle = model.bbox_head.register_forward_hook(
        lambda head, args, output: caught.append((args[0], *output)),
    )
    with torch.no_grad():
        (result,) = model.test_step(picture.batch)
    handle.remove()
    ((hidden, logits, boxes),) = caught
    node = choose_query(model, picture, 7).node
    torch.testing.assert_close(node.respond(images).detach(), hidden[-1][:, 7])
    outputs = query_outputs(model, sample, images, 7, label=2)
    expected = torch.cat([boxes[-1][:, 7], logits[-1][:, 7, 2:3].sigmoid()], 1)
    torch.testing.assert_close(outputs.respond(images).detach(), expected)
    x, y, w, h = boxes[-1][0, 7].tolist()
    corners = ((x - w / 2) * 90, (y - h / 2) * 60, (x + w / 2) * 90, (y + h / 2) * 60)
    assert outputs.box == pytest.approx(corners, abs=1e-3)
    best = query_outputs(model, sample, images, 7)
    assert best.name.startswith(f"box and score of class {int(logits[-1][0, 7].argmax())} ")

    found = result.pred_instances
    scores = logits[-1][0].sigmoid()
    scale = torch.tensor(picture.scale * 2)
    labels = found.labels.tolist()
    again = next(index for index in range(1, len(labels)) if labels[index] in labels[:index])
    for index in (0, again):
        label = int(found.labels[index])
        query = query_of(model, sample, images, (found.bboxes[index] * scale).tolist(), label)
        torch.testing.assert_close(scores[query, label], found.scores[index])
        assert choose_detection(model, picture, index).query == query
    with pytest.raises(ValueError, match="query must be from 0 to 9, got 10"):
        choose_query(model, picture, 10)
    with pytest.raises(ValueError, match="label must be from 0 to 4, got 9"):
        query_outputs(model, sample, images, 7, label=9)
    with pytest.raises(ValueError, match="DeformableDETR has no roi_head"):
        roi_node(model, sample, BOX)


def test_gradients_of_box_and_class(transformer: tuple) -> None:
    """By finite differences of x, y, w, h and c, and by the outputs of mmdet's own forward."""
    _, model, picture = transformer
    images, (sample,) = preprocess(model, picture)
    node = query_outputs(model, sample, images, 4, label=1)
    maps = output_gradients(node, images)
    assert maps.shape == (5, 64, 96) and (maps.amax((1, 2)) > 0).all()

    pixels = images.clone().requires_grad_()
    logits, boxes = model(pixels, [sample], mode="tensor")[:2]
    outputs = [*boxes[-1][0, 4], logits[-1][0, 4, 1].sigmoid()]
    for map, output in zip(maps, outputs, strict=True):
        (gradient,) = torch.autograd.grad(output, pixels, retain_graph=True)
        torch.testing.assert_close(map, gradient[0].square().sum(0).sqrt())


def test_gradients_are_finite_differences(transformer: tuple) -> None:
    _, model, picture = transformer
    images, (sample,) = preprocess(model, picture)
    model.double()
    try:
        images = images.double()
        node = query_outputs(model, sample, images, 4, label=1)
        maps = output_gradients(node, images)
        row, column = divmod(int(maps[0].argmax()), 96)
        squares = torch.zeros(5).double()
        for channel in range(3):
            responses = []
            for step in (-1e-4, 1e-4):
                moved = images.clone()
                moved[0, channel, row, column] += step
                responses.append(node.respond(moved)[0].detach())
            squares += ((responses[1] - responses[0]) / 2e-4).square()
        torch.testing.assert_close(maps[:, row, column], squares.sqrt(), rtol=1e-3, atol=1e-8)
    finally:
        model.float()

"""A scene holds what a detector made of an image, and leaves the detector as it was."""

import copy
import random

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
from mmdeform.analysis.detections import Place
from mmdeform.analysis.detectors import load_picture, picture_of
from mmdeform.analysis.scene import Scene, look

from .all_kinds import CLASSES, DETECTORS, KINDS


@pytest.mark.parametrize("name", DETECTORS)
def test_kinds_and_detections(name: str, scenes: dict[str, Scene]) -> None:
    scene = scenes[name]
    assert scene.kinds == KINDS[name]
    for kind in scene.kinds:
        assert all(call.kind == kind for call in scene.calls(kind))
    found = scene.detections()
    assert found and all(detection.name in CLASSES for detection in found)
    scores = [detection.score for detection in found]
    assert scores == sorted(scores, reverse=True)
    assert scene.detections(scores[0]) == [] or scene.detections(scores[0])[0].score == scores[0]
    missing = next(kind for kind in ("convolution", "keys") if kind not in scene.kinds)
    message = f"kind: no layer of '{missing}' ran; there are {', '.join(KINDS[name])}"
    with pytest.raises(ValueError, match=message):
        scene.calls(missing)


def test_detections_are_boxes_of_queries(scenes: dict[str, Scene]) -> None:
    scene = scenes["detr"]
    boxes = scene.result.pred_instances.bboxes.numpy()
    assert scene.query_boxes.shape == (12, 4)
    distances = np.abs(boxes[:, None] - scene.query_boxes[None]).max(-1)
    assert distances.min(1).max() < 1e-3
    assert distances.max() > 5
    assert scenes["two_stage"].query_boxes is None


def test_boxes_and_positions(scenes: dict[str, Scene]) -> None:
    scene = scenes["two_stage"]
    assert scene.picture.scale == (2.0, 2.0)
    assert scene.box_in_inputs([1, 2, 3, 4.5]).tolist() == [2, 4, 6, 9]
    assert scene.box_from_inputs([2, 4, 6, 9]).tolist() == [1, 2, 3, 4.5]
    for position in ((-0.5, 0), (95.5, 63.5), (0, -0.5)):
        scene.check(Place("inside", position))
    for position in ((-0.6, 0), (95.6, 0), (0, 63.6), (0, -0.6)):
        with pytest.raises(ValueError, match=r"lie in 1\.png, which is 96 pixels wide and 64 high"):
            scene.check(Place("outside", position))


def test_layers_are_chosen(detectors: dict, scenes: dict[str, Scene]) -> None:
    model, picture = detectors["two_stage"], scenes["two_stage"].picture
    scene = look(model, picture, "backbone.layer3.**", classes=["a"])
    assert scene.kinds == ["convolution"]
    assert {call.name.split(".")[1] for call in scene.recording} == {"layer3"}
    assert {detection.name for detection in scene.detections()} <= {"a", "class 1"}
    with pytest.raises(ValueError, match="'neck' matches no deformable layer"):
        look(model, picture, "neck")


@pytest.mark.parametrize("name", DETECTORS)
def test_the_detector_stays_as_it_is(name: str, detectors: dict, data: dict) -> None:
    model = copy.deepcopy(detectors[name]).train()
    model.backbone.eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    picture = load_picture(model, f"{data['data_root']}/1.png")

    def numbers() -> tuple:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    class Draws(torch.nn.Module):
        def forward(self, *args: object) -> None:
            random.random(), np.random.rand(), torch.rand(1)

    before = numbers()
    draws = Draws()
    handle = model.neck.register_forward_hook(lambda *_: draws())
    scene = look(model, picture)
    handle.remove()
    assert numbers() == before
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not module._forward_hooks for module in model.modules())
    evaluated = look(detectors[name], picture)
    for one, other in zip(scene.recording, evaluated.recording, strict=True):
        assert torch.equal(one.locations, other.locations)

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    handle = model.neck.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        look(model, picture)
    handle.remove()
    assert numbers() == before
    assert [module.training for module in model.modules()] == modes
    assert all(not module._forward_hooks for module in model.modules())


def test_pictures_of_a_data_set(detectors: dict, data: dict) -> None:
    from mmdet.registry import DATASETS

    dataset = DATASETS.build(data)
    picture, loaded = (
        picture_of(dataset, 1),
        load_picture(detectors["detr"], f"{data['data_root']}/1.png"),
    )
    assert picture.path == loaded.path and picture.scale == loaded.scale
    assert np.array_equal(picture.pixels, loaded.pixels)
    assert torch.equal(picture.batch["inputs"][0], loaded.batch["inputs"][0])

"""SamplingVisHook sends pictures of all kinds of layers to every backend, and changes nothing."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmdet")
import cv2
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.registry import VISBACKENDS, init_default_scope
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from mmengine.visualization.vis_backend import BaseVisBackend

from mmdeform.registry import HOOKS

from ..analysis.all_kinds import DETECTORS, KINDS, PIPELINE, move, write_data


@VISBACKENDS.register_module(force=True)
class PictureVisBackend(BaseVisBackend):
    """Keeps the pictures that it is given."""

    experiment = None
    pictures: ClassVar[list[tuple[str, int, np.ndarray]]] = []

    def _init_env(self) -> None:
        """Nothing to prepare."""

    def add_image(self, name: str, image: np.ndarray, step: int = 0, **kwargs: Any) -> None:
        self.pictures.append((name, step, image))


class Nothing(BaseMetric):
    """Measures nothing."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(0)

    def compute_metrics(self, results: list) -> dict[str, float]:
        return dict(nothing=0.0)


@pytest.fixture(autouse=True)
def fresh() -> None:
    init_default_scope("mmdet")
    PictureVisBackend.pictures.clear()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    # One for each iteration: mmengine waits before it starts anew.
    return write_data(tmp_path_factory.mktemp("data"), images=4)


@pytest.fixture(scope="module")
def detectors() -> dict[str, nn.Module]:
    """Detectors before training."""
    init_default_scope("mmdet")
    torch.manual_seed(2)
    models = {name: MODELS.build(ConfigDict(model())) for name, model in DETECTORS.items()}
    for model in models.values():
        model.init_weights()
        move(model)
    return models


def make_runner(
    model: nn.Module, data: dict[str, Any], work_dir: Path, *hooks: Any, **options: Any
) -> Runner:
    """Trains for three iterations, validates after the third; tells the backends everything."""
    pipeline = [PIPELINE[0], dict(type="LoadAnnotations", with_bbox=True), *PIPELINE[1:]]
    train = dict(data, pipeline=pipeline, test_mode=False, filter_cfg=dict(filter_empty_gt=True))
    loader = dict(batch_size=1, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=True))
    settings = dict(
        train_dataloader=dict(loader, dataset=train),
        train_cfg=dict(type="IterBasedTrainLoop", max_iters=3, val_interval=3),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.001)),
        val_dataloader=dict(
            loader, dataset=data, sampler=dict(type="DefaultSampler", shuffle=False)
        ),
        val_cfg=dict(),
        val_evaluator=Evaluator(Nothing()),
        visualizer=dict(
            type="Visualizer",
            vis_backends=[dict(type="LocalVisBackend"), dict(type="PictureVisBackend")],
        ),
        default_hooks=dict(logger=None, checkpoint=None),
    )
    with patch("mmengine.runner.runner.collect_env", return_value={}):  # it takes a second
        return Runner(
            model=model,
            work_dir=str(work_dir),
            experiment_name=f"{work_dir.name}-{len(Visualizer._instance_dict)}",
            default_scope="mmdet",
            randomness=dict(seed=0),
            custom_hooks=list(hooks),
            **{**settings, **options},
        )


def hook_of(**options: Any) -> dict[str, Any]:
    return dict(type="mmdeform.SamplingVisHook", dpi=30, **options)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", DETECTORS)
def test_every_backend_gets_pictures_and_training_stays_as_it_is(
    name: str, detectors: dict[str, nn.Module], data: dict[str, Any], tmp_path: Path
) -> None:
    states = []
    for hooks in ([], [hook_of(train_interval=2, images=1)]):
        model = copy.deepcopy(detectors[name])
        runner = make_runner(model, data, tmp_path / f"{len(hooks)}", *hooks)
        modes: list[list[bool]] = []
        with patch.object(model, "train_step", watching(model, modes)):
            runner.train()
        states.append((state_of(model), modes, torch.get_rng_state(), np.random.get_state()[1]))
    (plain, plain_modes, *plain_random), (watched, modes, *watched_random) = states
    assert plain_modes == modes
    for before, after in zip(plain_random, watched_random, strict=True):
        assert np.array_equal(np.asarray(before), np.asarray(after))
    assert all(torch.equal(value, watched[key]) for key, value in plain.items())
    initial = detectors[name].state_dict()
    assert any(not torch.equal(value, watched[key]) for key, value in initial.items())

    pictures = PictureVisBackend.pictures
    expected = [(f"sampling_{kind}", step) for step in (0, 2, 3) for kind in KINDS[name]]
    assert [(picture, step) for picture, step, _ in pictures] == expected
    for picture, step, image in pictures:
        (path,) = (tmp_path / "1").rglob(f"vis_image/{picture}_{step}.png")
        assert np.array_equal(cv2.imread(str(path))[..., ::-1], image)
        assert image.dtype == np.uint8 and image.shape[1] == pytest.approx(4 * 3.2 * 30, abs=1)
    first, last = pictures[0][2], pictures[len(expected) - len(KINDS[name])][2]
    assert first.shape == last.shape and not np.array_equal(first, last)  # it has learnt
    assert not any(module._forward_hooks for module in model.modules())


def watching(model: nn.Module, modes: list[list[bool]]) -> Callable[..., Any]:
    """A train_step that notes the modes of all modules before each step."""
    step = model.train_step

    def train_step(*args: Any, **kwargs: Any) -> Any:
        modes.append([module.training for module in model.modules()])
        return step(*args, **kwargs)

    return train_step


def test_chosen_images_kinds_and_layers(
    detectors: dict[str, nn.Module], data: dict[str, Any], tmp_path: Path
) -> None:
    hook = HOOKS.build(
        hook_of(images=[2], objects=1, kinds=["convolution"], layers="backbone.layer4.*.conv2")
    )
    runner = make_runner(copy.deepcopy(detectors["two_stage"]), data, tmp_path, hook)
    with (
        patch("mmdeform.analysis.drawing.draw") as draw,
        patch("mmdeform.analysis.drawing.to_rgb", return_value=np.zeros((8, 8, 3), np.uint8)),
    ):
        runner.val()
    ((rows,), _) = draw.call_args
    (row,) = rows
    assert row.scene.picture.path.name == "2.png"
    assert [place.name for place in row.places] == ["disc", "background"]
    assert row.places[0].box.tolist() == [8, 10, 38, 50]  # the largest
    assert row.panels[1].layers == ["backbone.layer4.0.conv2", "backbone.layer4.1.conv2"]
    assert [(name, step) for name, step, _ in PictureVisBackend.pictures] == [
        ("sampling_convolution", 0)
    ]


def test_images_without_objects_are_passed_over(
    detectors: dict[str, nn.Module], data: dict[str, Any], tmp_path: Path
) -> None:
    hook = HOOKS.build(hook_of(images=2))
    hook._choose(make_runner(detectors["detr"], data, tmp_path))
    assert hook._indices == [1, 2]


def test_every_second_validation(
    detectors: dict[str, nn.Module], data: dict[str, Any], tmp_path: Path
) -> None:
    hook = HOOKS.build(hook_of(interval=2, images=1))
    runner = make_runner(detectors["detr"], data, tmp_path)
    with patch.object(hook, "_draw") as draw:
        for _ in range(5):
            hook.after_val_epoch(runner)
    assert draw.call_count == 2


def test_averaged_weights_are_shown(
    detectors: dict[str, nn.Module], data: dict[str, Any], tmp_path: Path
) -> None:
    hook = HOOKS.build(hook_of(images=1))
    model = copy.deepcopy(detectors["two_stage"])
    ema = dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=0.5)
    runner = make_runner(model, data, tmp_path, ema, hook)
    name = "neck.lateral_convs.0.conv.weight"
    seen: list[Tensor] = []
    validated: list[Tensor] = []
    see = lambda *_: seen.append(state_of(model)[name])  # noqa: E731
    with patch.object(hook, "_draw", see), patch.object(
        runner.val_loop.evaluator, "evaluate",
        side_effect=lambda *_: validated.append(state_of(model)[name]) or {},
    ):  # fmt: skip
        runner.train()
    assert torch.equal(seen[-1], validated[0])
    assert not torch.equal(seen[-1], state_of(model)[name])


def test_only_the_main_process_draws(
    detectors: dict[str, nn.Module], data: dict[str, Any], tmp_path: Path
) -> None:
    runner = make_runner(detectors["detr"], data, tmp_path)
    with patch("mmdeform.engine.hooks.sampling_vis_hook.is_main_process", return_value=False):
        HOOKS.build(hook_of()).before_train(runner)
    assert PictureVisBackend.pictures == []


def test_tensorboard(detectors: dict[str, nn.Module], data: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    visualizer = dict(type="Visualizer", vis_backends=[dict(type="TensorboardVisBackend")])
    runner = make_runner(detectors["detr"], data, tmp_path, hook_of(), visualizer=visualizer)
    runner.val()
    runner.visualizer.close()
    (events,) = tmp_path.rglob("events.out.*")
    accumulator = EventAccumulator(str(events.parent)).Reload()
    assert set(accumulator.Tags()["images"]) == {"sampling_attention", "sampling_keys"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(interval=0), "interval must be an integer >= 1, got 0"),
        (dict(train_interval=0), "train_interval must be an integer >= 1, got 0"),
        (dict(images=0), "images must be an integer >= 1, got 0"),
        (dict(images=[]), "images must name at least one image"),
        (dict(objects=1.5), "objects must be an integer >= 1, got 1.5"),
        (dict(depth=0), "depth must be an integer >= 1, got 0"),
        (dict(kinds=["convolutions"]), "kinds must be some of"),
        (dict(kinds="keys"), "kinds must be some of"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"SamplingVisHook: {message}"):
        HOOKS.build(dict(type="mmdeform.SamplingVisHook", **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(images=[4]), "indices of the validation set, between 0 and 3, got 4"),
        (dict(images=[0]), "number 0 of the validation set has no object"),
        (dict(layers="neck.*"), "'neck.*' matches no deformable layer"),
        (dict(kinds=["keys"]), "no layer of 'keys' ran; there are convolution, roi_pooling"),
        (dict(layers="backbone.**", depth=5), "between 1 and the number of chosen"),
    ],
)
def test_errors_show_before_training(
    options: dict[str, Any],
    message: str,
    detectors: dict[str, nn.Module],
    data: dict[str, Any],
    tmp_path: Path,
) -> None:
    runner = make_runner(copy.deepcopy(detectors["two_stage"]), data, tmp_path, hook_of(**options))
    with pytest.raises(ValueError, match=message):
        runner.train()
    assert runner.iter == 0


def test_there_must_be_a_validation_set(
    detectors: dict[str, nn.Module], data: dict[str, Any], tmp_path: Path
) -> None:
    without = dict(val_dataloader=None, val_cfg=None, val_evaluator=None)
    model = copy.deepcopy(detectors["detr"])
    runner = make_runner(model, data, tmp_path, hook_of(), **without)
    with pytest.raises(ValueError, match="images of the validation set, but there is none"):
        runner.train()

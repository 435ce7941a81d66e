"""Draws during training where deformable layers sample."""

import itertools
from collections.abc import Sequence
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from mmdeform.analysis.recording import KINDS
from mmdeform.registry import HOOKS

__all__ = ["SamplingVisHook"]


@HOOKS.register_module()
class SamplingVisHook(Hook):
    """Draws where the deformable layers of a detector sample, for the same images every time.

    A picture for each kind of layers goes to all visualization backends as ``sampling_<kind>``, at
    the step of the losses: what ``tools/visualize_sampling.py`` draws, for the largest annotated
    objects of some images of the validation set and their background, a row for each. RoIs and
    object queries are those whose boxes are nearest to the annotated ones. The first pictures are
    drawn before training starts, which is also when errors in the arguments show.

    Training stays as it is, to the last bit: weights, random numbers, modes and statistics. With
    EMAHook pictures at validation show the averaged weights, which are validated. Only the main
    process draws.

    Args:
        interval: Validations between two pictures. Default: 1.
        train_interval: Training iterations between two pictures. Default: None, which draws at
            validations alone.
        images: How many images, the first with an annotated object; or their indices in the
            validation set. Default: 2.
        objects: Objects in each image. Default: 2.
        kinds: Kinds of layers: 'convolution', 'roi_pooling', 'attention' (multi-scale deformable
            attention) or 'keys' (DAT). Default: all that the detector has.
        layers: A pattern or several of the layers to show; see
            :func:`mmdeform.layers.sampling.deformable_layers`. Default: None, those that tell most.
        depth: Convolutions to look through. Default: None: 3, or as many as there are.
        score_thr: Least score of the detections in the first column. Default: 0.3.
        dpi: Pixels per inch; a panel is 3.2 inches wide. Default: 100.

    Raises:
        ValueError: An argument is out of range; when training starts: there is no validation set,
            it has not these images, the model has no such layer, or a pattern matches none.
    """

    priority = "ABOVE_NORMAL"  # before EMAHook takes back the weights that were validated

    def __init__(
        self,
        interval: int = 1,
        train_interval: int | None = None,
        images: int | Sequence[int] = 2,
        objects: int = 2,
        kinds: Sequence[str] | None = None,
        layers: str | Sequence[str] | None = None,
        depth: int | None = None,
        score_thr: float = 0.3,
        dpi: int = 100,
    ) -> None:
        numbers = dict(interval=interval, objects=objects, dpi=dpi)
        if isinstance(images, int):
            numbers.update(images=images)
        if train_interval is not None:
            numbers.update(train_interval=train_interval)
        if depth is not None:
            numbers.update(depth=depth)
        for name, value in numbers.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"SamplingVisHook: {name} must be an integer >= 1, got {value!r}")
        if not isinstance(images, int) and not images:
            raise ValueError("SamplingVisHook: images must name at least one image, but is empty")
        unknown = [kind for kind in kinds or () if kind not in KINDS]
        if unknown or isinstance(kinds, str):
            raise ValueError(f"SamplingVisHook: kinds must be some of {KINDS}, got {kinds!r}")
        self.interval = interval
        self.train_interval = train_interval
        self.images = images
        self.objects = objects
        self.kinds = kinds
        self.layers = layers
        self.depth = depth
        self.score_thr = score_thr
        self.dpi = dpi
        self._validations = 0
        self._indices: list[int] = []

    def before_train(self, runner: Runner) -> None:
        """Chooses the images and draws the first pictures."""
        self._choose(runner)
        self._draw(runner, runner.iter)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Draws every ``train_interval`` iterations."""
        if self.train_interval and self.every_n_train_iters(runner, self.train_interval):
            self._draw(runner, runner.iter + 1)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Draws every ``interval`` validations."""
        self._validations += 1
        if self._validations % self.interval == 0:
            if not self._indices:  # a validation without a training
                self._choose(runner)
            self._draw(runner, runner.iter)

    def _choose(self, runner: Runner) -> None:
        """Finds the images."""
        if runner.val_loop is None:
            raise ValueError(
                "SamplingVisHook draws images of the validation set, but there is none: give "
                "val_dataloader, val_cfg and val_evaluator"
            )
        dataset = runner.val_loop.dataloader.dataset
        with_objects = (i for i in range(len(dataset)) if _objects(dataset.get_data_info(i)))
        if isinstance(self.images, int):
            chosen = list(itertools.islice(with_objects, self.images))
            if not chosen:
                raise ValueError("SamplingVisHook: no image of the validation set has an object")
        else:
            chosen = list(self.images)
            for index in chosen:
                if not 0 <= index < len(dataset):
                    raise ValueError(
                        "SamplingVisHook: images must be indices of the validation set, between 0 "
                        f"and {len(dataset) - 1}, got {index}"
                    )
                if not _objects(dataset.get_data_info(index)):
                    raise ValueError(
                        f"SamplingVisHook: images: number {index} of the validation set has no "
                        "object"
                    )
        self._indices = chosen

    def _draw(self, runner: Runner, step: int) -> None:
        if not is_main_process():
            return
        # Pictures need mmdet and matplotlib, the other hooks do not.
        from mmdeform.analysis.drawing import draw, to_rgb

        for kind, rows in self._rows(runner).items():
            image = to_rgb(draw(rows), self.dpi)
            runner.visualizer.add_image(f"sampling_{kind}", image, step=step)

    def _rows(self, runner: Runner) -> dict[str, list[Any]]:
        """Rows of each picture by kind."""
        from mmdeform.analysis.detections import annotated_places, background_place
        from mmdeform.analysis.detectors import picture_of
        from mmdeform.analysis.drawing import DetectionsPanel, Look, panels_of
        from mmdeform.analysis.scene import look, undisturbed

        model = _unwrapped(runner.model)
        dataset = runner.val_loop.dataloader.dataset
        classes = dataset.metainfo.get("classes", ())
        what = Look(self.layers is not None, self.depth)
        rows: dict[str, list[Any]] = {}
        for index in self._indices:
            with undisturbed(model):
                picture = picture_of(dataset, index)
            scene = look(model, picture, self.layers or "**", classes)
            places = annotated_places(dataset.get_data_info(index), classes)
            background = background_place(picture.size, [], [place.box for place in places])
            objects = places[: self.objects + 1]
            shown = objects[: self.objects] + ([background] if background else [])
            overview = DetectionsPanel.of(scene, self.score_thr)
            for kind in self.kinds or scene.kinds:
                of_kind = panels_of(kind, scene, shown, overview, what, objects)
                rows.setdefault(kind, []).extend(of_kind)
        return rows


def _objects(info: dict[str, Any]) -> list[Any]:
    """Annotated objects of an image, without crowds."""
    return [instance for instance in info["instances"] if not instance.get("ignore_flag")]


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model

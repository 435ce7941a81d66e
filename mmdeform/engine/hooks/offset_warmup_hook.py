"""Lets offsets grow slowly at the beginning of training."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmdeform.layers.predictors import Predictor, initial_offset, predictors
from mmdeform.layers.sampling import deformable_layers
from mmdeform.registry import HOOKS

__all__ = ["OffsetWarmupHook"]


@HOOKS.register_module()
class OffsetWarmupHook(Hook):
    """Scales predicted offsets by a factor that rises linearly from ``start`` to 1.

    During the first ``iters`` iterations a layer samples at

        initial + factor * (predicted - initial)

    where ``initial`` is what a fresh layer predicts: zero for convolutions and RoI pooling, the
    pattern around the reference point for multi-scale deformable attention. It is zero for DAT,
    too, although a fresh one predicts random offsets. Masks and attention weights are not touched,
    nor are layers that take their offsets as an input. The first iteration has the factor
    ``start``; from iteration ``iters`` on there is no hook left, and the model is bitwise the plain
    one.

    The offsets themselves are scaled, and not their gradients or learning rates, because Adam
    divides by the size of the gradients: with it a small gradient makes steps as long as a large
    one. A small learning rate, on the other hand, does not help where the offsets of a pretrained
    or badly initialised layer are large from the start. The gradients of the predicting layers are
    scaled along.

    The factor depends on the iteration alone, so that training resumes with it. Validation during
    the warm-up uses it, too. It is not part of the model: a checkpoint saved during the warm-up and
    evaluated without the hook, as by a test script, samples farther out than it did in training.
    Limits of a layer (``offset_range``, ``offset_clamp``; ``offset_range_factor`` of DAT) apply to
    the scaled prediction.

    Args:
        iters: Iterations until the factor is 1. Default: 500.
        start: The factor at first, in [0, 1]. Default: 0.0.
        layers: A pattern or several, of which a layer's name has to match one; see
            :func:`mmdeform.layers.sampling.deformable_layers`. Default: all deformable layers.

    Raises:
        ValueError: An argument is out of range; when training starts: the model has no deformable
            layer, a pattern matches none, or none of the layers predicts its offsets.
    """

    def __init__(
        self, iters: int = 500, start: float = 0.0, layers: str | Sequence[str] = "**"
    ) -> None:
        if not isinstance(iters, int) or iters < 1:
            raise ValueError(f"OffsetWarmupHook: iters must be an integer >= 1, got {iters!r}")
        if not 0 <= start <= 1:
            raise ValueError(f"OffsetWarmupHook: start must be in [0, 1], got {start!r}")
        self.iters = iters
        self.start = start
        self.layers = layers
        self._handles: list[RemovableHandle] = []
        self._scales: list[_Scale] = []

    def factor(self, iteration: int) -> float:
        """The factor in an iteration, counted from 0."""
        return self.start + (1 - self.start) * min(1.0, iteration / self.iters)

    def before_train(self, runner: Runner) -> None:
        """Attaches the hooks, unless a resumed training has left the warm-up behind."""
        self._detach()
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        layers = deformable_layers(model, self.layers)
        names = []
        for name, layer in layers.items():
            for predictor in predictors(layer):
                if predictor.is_offset.any():
                    names.append(f"{name}.{predictor.name}")
                    scale = _Scale(predictor, initial_offset(layer))
                    self._scales.append(scale)
                    self._handles.append(predictor.module.register_forward_hook(scale))
        if not names:
            raise ValueError(
                "OffsetWarmupHook: none of these layers predicts its offsets, they are inputs: "
                f"{', '.join(layers)}"
            )
        self._set_factor(runner)
        if self._handles:
            runner.logger.info(
                f"OffsetWarmupHook scales what these layers predict until iteration {self.iters}: "
                f"{', '.join(names)}"
            )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Sets the factor of this iteration."""
        self._set_factor(runner)

    def after_train(self, runner: Runner) -> None:
        """Leaves no hook behind, also if training ends during the warm-up."""
        self._detach()

    def _set_factor(self, runner: Runner) -> None:
        factor = self.factor(runner.iter)
        if factor == 1:
            self._detach()
        for scale in self._scales:
            scale.factor = factor

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._scales = [], []


class _Scale:
    """A forward hook that scales the offsets in the output of a predictor."""

    def __init__(self, predictor: Predictor, initial: Tensor | None) -> None:
        shape = (-1,) + (1,) * (-predictor.channel_dim - 1)
        self.is_offset = predictor.is_offset.view(shape)
        self.initial = initial if initial is None else initial.view(shape)
        self.factor = 1.0

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        factor = torch.where(self.is_offset, self.factor, 1.0).to(output)
        if self.initial is None:
            return output * factor
        initial = self.initial.to(output)
        return initial + (output - initial) * factor

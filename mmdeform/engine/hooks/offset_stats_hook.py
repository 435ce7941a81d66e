"""Watches offsets and masks during training."""

from collections.abc import Sequence
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn
from torch.utils.hooks import RemovableHandle

from mmdeform.layers.sampling import deformable_layers, watch_sampling
from mmdeform.registry import HOOKS

from .finite_check import FiniteCheck
from .offset_statistics import OffsetStatistics

__all__ = ["OffsetStatsHook"]


@HOOKS.register_module()
class OffsetStatsHook(Hook):
    """Tells for each deformable layer how far and where it samples; stops at NaN and infinity.

    Every ``interval`` iterations a table goes to the text log, and every number to all
    visualization backends as ``offset/<layer>/<statistic>``, at the step of the losses:

    ================== =========================================================================
    ``p50`` ...        percentiles of the length of the offsets, in pixels of the sampled map; for
                       RoI pooling in fractions of the RoI's width and height
    ``max``            the longest offset
    ``outside``        share of samples outside the map, which read nothing: not -1 < x < width or
                       not -1 < y < height (of RoI pooling: bins whose centre is there); without
                       offsets that of the taps in the padding
    ``mask_mean``      mean of the masks; not for softmaxed weights
    ``mask_saturated`` share of masks below 0.05 or above 0.95, where a sigmoid hardly learns
    ``entropy``        of softmaxed weights, relative to equal ones: 1 is an average, 0 one sample
    ================== =========================================================================

    The offsets are those that the layer uses, of our classes and of mmcv's, taken from the first
    forward pass of the model in the iteration; all calls of a layer count together. Percentiles of
    more than 2**20 samples are those of as many, drawn at random.

    Forward hooks are there only during the forward passes that are looked at. Outputs, gradients
    and the state of random numbers stay what they are. A measured iteration predicts every offset
    twice. The check reads the inputs, predictions and outputs of the layers once more and waits for
    the device once, between forward and backward pass; the parameters and optimizer are then still
    as before the iteration. Under distributed training the first process measures its own batch;
    all check theirs.

    Args:
        interval: Iterations between two measurements. Default: 50.
        percentiles: Percentiles of the length of the offsets, each in [0, 100].
            Default: (50, 95, 99).
        layers: A pattern or several, of which a layer's name has to match one; see
            :func:`mmdeform.layers.sampling.deformable_layers`. Default: all deformable layers.
        check_nan: Stops training with a RuntimeError that names the layer, and what in it is NaN or
            infinite: an input, the offset, the mask, the weights or the output. If the forward pass
            itself fails on such numbers, the same is logged as an error. Default: True.
        check_interval: Iterations between two of these checks. Default: 1.

    Raises:
        ValueError: An argument is out of range; when training starts: the model has no deformable
            layer, or a pattern matches none.
    """

    priority = "NORMAL"  # before checkpoints are saved

    def __init__(
        self,
        interval: int = 50,
        percentiles: Sequence[float] = (50, 95, 99),
        layers: str | Sequence[str] = "**",
        check_nan: bool = True,
        check_interval: int = 1,
    ) -> None:
        for name, value in (("interval", interval), ("check_interval", check_interval)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"OffsetStatsHook: {name} must be an integer >= 1, got {value!r}")
        if not percentiles or not all(0 <= percentile <= 100 for percentile in percentiles):
            raise ValueError(
                f"OffsetStatsHook: percentiles must be numbers in [0, 100], got {percentiles!r}"
            )
        self.interval = interval
        self.percentiles = tuple(percentiles)
        self.layers = layers
        self.check_nan = check_nan
        self.check_interval = check_interval
        self._watched: dict[str, nn.Module] = {}
        self._handles: list[RemovableHandle] = []  # of the layers
        self._model_handle: RemovableHandle | None = None
        self._statistics: dict[str, OffsetStatistics] | None = None
        self._check: FiniteCheck | None = None
        self._results: dict[str, dict[str, float]] | None = None

    def before_train(self, runner: Runner) -> None:
        """Finds the layers."""
        self._watched = deformable_layers(_unwrapped(runner.model), self.layers)
        runner.logger.info(
            f"OffsetStatsHook watches {len(self._watched)} deformable layers: "
            f"{', '.join(self._watched)}"
        )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Attaches the hooks of this iteration, if any."""
        self._detach()
        self._results = None
        if self.every_n_train_iters(runner, self.interval):
            statistics = {name: OffsetStatistics() for name in self._watched}
            self._statistics = statistics
            self._handles += watch_sampling(
                self._watched, lambda name, sampling: statistics[name].add(sampling)
            )
        if self.check_nan and self.every_n_train_iters(runner, self.check_interval):
            self._check = FiniteCheck(self._watched)
            self._handles += self._check.watch()
        if self._handles:
            # Called also if the forward pass fails.
            self._model_handle = _unwrapped(runner.model).register_forward_hook(
                lambda model, args, output: self._after_forward(runner, failed=output is None),
                always_call=True,
            )

    def _after_forward(self, runner: Runner, failed: bool) -> None:
        # Only hooks of the layers: torch goes through the model's own while it handles a failure.
        self._remove_layer_hooks()
        check, self._check = self._check, None
        statistics, self._statistics = self._statistics, None
        problem = None if check is None else check.report()
        if problem is not None:
            where = f"iteration {runner.iter + 1}"
            if runner.world_size > 1:
                where += f", rank {runner.rank}"
            message = f"OffsetStatsHook: {where}: {problem}"
            if not failed:
                raise RuntimeError(message)
            runner.logger.error(message)
        if statistics is not None and not failed:
            self._results = {
                name: of_layer.compute(self.percentiles) for name, of_layer in statistics.items()
            }

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Reports what was measured."""
        self._detach()
        results, self._results = self._results, None
        if results is None or not is_main_process():
            return
        runner.logger.info(_table(results, runner.iter + 1))
        scalars = {
            f"offset/{layer}/{name}": value
            for layer, values in results.items()
            for name, value in values.items()
        }
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)

    def after_train(self, runner: Runner) -> None:
        """Leaves no hook behind."""
        self._detach()

    def _detach(self) -> None:
        self._remove_layer_hooks()
        if self._model_handle is not None:
            self._model_handle.remove()
        self._model_handle = self._check = self._statistics = None

    def _remove_layer_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model


def _table(results: dict[str, dict[str, float]], iteration: int) -> str:
    """A row for each layer that ran, a column for each statistic that any of them has."""
    idle = [layer for layer, values in results.items() if not values]
    results = {layer: values for layer, values in results.items() if values}
    names = list(dict.fromkeys(name for values in results.values() for name in values))
    formats = dict(outside=".2%", mask_saturated=".2%", mask_mean=".3f", entropy=".3f")
    rows = [["layer", *names]]
    for layer, values in results.items():
        cells = [
            f"{values[name]:{formats.get(name, '.3g')}}" if name in values else "-"
            for name in names
        ]
        rows.append([layer, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    if idle:
        lines.append(f"without samples: {', '.join(idle)}")
    title = f"Offsets at iteration {iteration} (pixels of the sampled map; RoI pooling: RoI sizes)"
    return "\n".join([title, *lines])

"""A tiny training: a model of a few layers, driven by mmengine's runner."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmdeform.engine.hooks.offset_statistics import OffsetStatistics
from mmdeform.layers import ModulatedDeformConv2dPack
from mmdeform.layers.sampling import Sampling
from mmdeform.registry import HOOKS

IMAGES = [torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(1)) for _ in range(4)]


class Network(BaseModel):
    """Calls ``run(layers, x)``, by default one layer after the other; the loss is a mean square."""

    def __init__(
        self, run: Callable[[nn.ModuleDict, Tensor], Tensor] | None = None, **layers: nn.Module
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.run = run
        self.outputs: list[Tensor] = []

    def forward(self, inputs: Tensor, mode: str = "tensor") -> Any:
        x = inputs
        if self.run is not None:
            x = self.run(self.layers, x)
        else:
            for layer in self.layers.values():
                x = layer(x)
        self.outputs.append(x.detach())
        return {"loss": x.float().square().mean()} if mode == "loss" else [x]


class Call(Hook):
    """Calls a function before each training iteration."""

    priority = "LOWEST"

    def __init__(self, function: Callable[[Runner], None]) -> None:
        self.function = function

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.function(runner)


def make_runner(
    model: nn.Module,
    images: Sequence[Tensor],
    hooks: Sequence[Any],
    work_dir: Path,
    iterations: int = 4,
    **options: Any,
) -> Runner:
    """A runner that trains with a batch of one image per iteration."""
    options.setdefault("optim_wrapper", dict(optimizer=dict(type="SGD", lr=0.1)))
    options.setdefault("train_cfg", dict(by_epoch=False, max_iters=iterations))
    with patch("mmengine.runner.runner.collect_env", return_value={}):  # it takes a second
        return Runner(
            model=model,
            work_dir=str(work_dir),
            experiment_name=f"{work_dir.name}-{len(Visualizer._instance_dict)}",
            train_dataloader=DataLoader(
                [dict(inputs=image) for image in images],
                batch_size=1,
                collate_fn=lambda batch: dict(
                    inputs=torch.stack([item["inputs"] for item in batch])
                ),
            ),
            custom_hooks=list(hooks),
            randomness=dict(seed=0),
            **options,
        )


def has_hooks(model: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def dcn(**options: Any) -> ModulatedDeformConv2dPack:
    """Offsets of lengths 0 to 8 and a saturated mask at one of 9 taps."""
    layer = ModulatedDeformConv2dPack(2, 2, 3, padding=1, **options)
    layer.conv_offset.bias.data[1:18:2] = torch.arange(9.0)  # x
    layer.conv_offset.bias.data[18] = 100.0
    return layer


def stats_hook(**options: Any) -> Any:
    return HOOKS.build(dict(type="mmdeform.OffsetStatsHook", interval=1, **options))


def statistics(*samplings: Sampling, percentiles: tuple = (50, 95)) -> dict[str, float]:
    collected = OffsetStatistics()
    for sampling in samplings:
        collected.add(sampling)
    return collected.compute(percentiles)

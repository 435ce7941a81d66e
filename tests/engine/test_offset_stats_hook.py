"""OffsetStatsHook reports what the layers sampled, and leaves training as it is."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmcv.ops")
from mmcv.ops import ModulatedDeformConv2dPack as MmcvDCNv2
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS, VISBACKENDS
from mmengine.visualization.vis_backend import BaseVisBackend
from torch.utils.checkpoint import checkpoint

from mmdeform.layers import (
    DCNv3,
)
from mmdeform.layers.sampling import sampled
from mmdeform.registry import HOOKS

from .training import IMAGES, Network, dcn, has_hooks, make_runner, statistics, stats_hook


@OPTIM_WRAPPERS.register_module(force=True)
class BFloat16OptimWrapper(OptimWrapper):
    """What AmpOptimWrapper is where there is a GPU."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast("cpu", torch.bfloat16):
            yield


@VISBACKENDS.register_module(force=True)
class RecordingVisBackend(BaseVisBackend):
    """Keeps what it is given."""

    experiment = None
    scalars: ClassVar[list[tuple[dict, int]]] = []

    def _init_env(self) -> None:
        """Nothing to prepare."""

    def add_scalars(self, scalar_dict: dict, step: int = 0, *args: Any, **kwargs: Any) -> None:
        self.scalars.append((dict(scalar_dict), step))


@pytest.fixture
def process_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of this process alone."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


class TestReports:
    def test_every_backend_and_the_log(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        RecordingVisBackend.scalars.clear()
        model = Network(first=dcn(), second=DCNv3(2, 2, 3, padding=1))
        visualizer = dict(
            type="Visualizer",
            vis_backends=[dict(type="LocalVisBackend"), dict(type="RecordingVisBackend")],
        )
        stats = dict(type="mmdeform.OffsetStatsHook", interval=2, percentiles=(50,))
        runner = make_runner(model, IMAGES, [stats], tmp_path, visualizer=visualizer)
        runner.train()

        recorded = [
            (scalars, step)
            for scalars, step in RecordingVisBackend.scalars
            if "offset" in str(scalars)
        ]
        assert [step for _, step in recorded] == [2, 4]
        values = recorded[0][0]
        name = "offset/layers.first"
        assert values[f"{name}/p50"] == pytest.approx(4, abs=0.1)
        assert values[f"{name}/max"] == pytest.approx(8, abs=0.1)
        assert set(values) - {"step"} == {
            *(f"{name}/{key}" for key in ("p50", "max", "outside", "mask_mean", "mask_saturated")),
            *(f"offset/layers.second/{key}" for key in ("p50", "max", "outside", "entropy")),
        }
        (path,) = tmp_path.rglob("scalars.json")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["step"] for line in lines if f"{name}/p50" in line] == [2, 4]
        assert lines[0][f"{name}/max"] == values[f"{name}/max"]

        (log,) = tmp_path.rglob("*.log")
        text = log.read_text()
        assert text.count("Offsets at iteration") == 2
        table = text[text.index("Offsets at iteration 2") :].splitlines()[1:4]
        assert table[0].split() == [
            "layer", "p50", "max", "outside", "mask_mean", "mask_saturated", "entropy",
        ]  # fmt: skip
        assert table[1].split()[0] == "layers.first" and table[1].split()[-1] == "-"
        assert table[2].split()[0] == "layers.second" and table[2].split()[-1] == "1.000"
        assert len({len(line) for line in table}) == 1  # aligned
        assert float(table[1].split()[1]) == pytest.approx(values[f"{name}/p50"], rel=0.01)
        assert table[1].split()[3] == f"{values[f'{name}/outside']:.2%}"

    def test_tensorboard(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        visualizer = dict(type="Visualizer", vis_backends=[dict(type="TensorboardVisBackend")])
        make_runner(
            Network(first=dcn()), IMAGES, [stats_hook()], tmp_path, visualizer=visualizer
        ).train()
        (path,) = tmp_path.rglob("events.out.*")
        assert b"offset/layers.first/p50" in path.read_bytes()

    def test_chosen_layers_and_layers_that_do_not_run(self, tmp_path: Path) -> None:
        model = Network(
            lambda layers, x: layers["a"](layers["plain"](x)), a=dcn(), b=dcn(), plain=dcn()
        )
        make_runner(model, IMAGES, [stats_hook(layers="layers.[ab]")], tmp_path).train()
        text = next(tmp_path.rglob("*.log")).read_text()
        table = text[text.index("Offsets at iteration 1 ") :]
        assert "layers.a  " in table and "layers.plain  " not in table
        assert "without samples: layers.b" in table

    def test_several_calls_of_a_layer_count_together(self, tmp_path: Path) -> None:
        def run(layers: nn.ModuleDict, x: Tensor) -> Tensor:
            return layers["dcn"](x).mean() + layers["dcn"](x[..., :2]).mean()

        stats = stats_hook(check_nan=False)
        results: list[dict] = []
        stats_after = stats.after_train_iter

        def keep(runner: Any, *args: Any, **kwargs: Any) -> None:
            results.append(stats._results)
            stats_after(runner, *args, **kwargs)

        stats.after_train_iter = keep
        layer = dcn()
        expected = statistics(
            *(sampled(layer, (image[None],)) for image in (IMAGES[0], IMAGES[0][..., :2])),
            percentiles=(50, 95, 99),
        )
        make_runner(Network(run, dcn=layer), IMAGES, [stats], tmp_path, iterations=1).train()
        assert results == [{"layers.dcn": expected}]

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_activation_checkpointing(self, tmp_path: Path, reentrant: bool) -> None:
        def run(layers: nn.ModuleDict, x: Tensor) -> Tensor:
            return checkpoint(layers["dcn"], x.requires_grad_(), use_reentrant=reentrant)

        make_runner(Network(run, dcn=dcn()), IMAGES, [stats_hook()], tmp_path).train()
        assert next(tmp_path.rglob("*.log")).read_text().count("Offsets at iteration") == 4

    def test_distributed(self, tmp_path: Path, process_group: None) -> None:
        model = MMDistributedDataParallel(Network(first=dcn()))
        hooks = [stats_hook(), dict(type="mmdeform.OffsetWarmupHook", iters=4)]
        make_runner(model, IMAGES, hooks, tmp_path).train()
        text = next(tmp_path.rglob("*.log")).read_text()
        table = text[text.index("Offsets at iteration 4 ") :].splitlines()
        name, *numbers = table[2].split()
        assert name == "layers.first"
        assert float(numbers[3]) == pytest.approx(8 * 0.75, abs=0.2)  # the warm-up's factor
        assert "predict until iteration 4: layers.first.conv_offset" in text
        assert not has_hooks(model)


class TestMeasuringChangesNothing:
    @pytest.mark.parametrize(
        "optim_wrapper",
        [
            dict(type="OptimWrapper"),
            dict(type="OptimWrapper", accumulative_counts=2),
            dict(type="BFloat16OptimWrapper"),
        ],
        ids=["fp32", "accumulate", "amp"],
    )
    def test_training_is_bitwise_the_same(self, tmp_path: Path, optim_wrapper: dict) -> None:
        def train(name: str, hooks: list) -> tuple[dict, list[Tensor], Tensor]:
            torch.manual_seed(0)
            model = Network(
                first=dcn(),
                drop=nn.Dropout(0.5),
                mmcv=MmcvDCNv2(2, 2, 3, padding=1),
                third=DCNv3(2, 2, 3, padding=1, norm_layer="BN"),
            )
            if "BFloat16" in optim_wrapper["type"]:
                del model.layers["mmcv"]  # whose CPU kernels have no bf16
            wrapper = dict(optim_wrapper, optimizer=dict(type="Adam", lr=0.01))
            make_runner(model, IMAGES, hooks, tmp_path / name, optim_wrapper=wrapper).train()
            assert not has_hooks(model)
            return model.state_dict(), model.outputs, torch.rand(2)

        plain, watched = train("plain", []), train("watched", [stats_hook()])
        for name, value in plain[0].items():
            assert torch.equal(watched[0][name], value), name
        assert all(map(torch.equal, plain[1], watched[1])) and len(plain[1]) == 4
        assert torch.equal(plain[2], watched[2])
        assert "Offsets at iteration 4" in next((tmp_path / "watched").rglob("*.log")).read_text()

    def test_hooks_are_there_only_in_the_forward_pass(self, tmp_path: Path) -> None:
        seen: list[tuple[int, bool, bool]] = []

        def run(layers: nn.ModuleDict, x: Tensor) -> Tensor:
            inside = has_hooks(layers)
            x = layers["dcn"](x)
            x.register_hook(lambda _: seen.append((inside, has_hooks(layers))))
            return x

        stats = stats_hook(check_nan=False)
        stats.interval = 2
        model = Network(run, dcn=dcn())
        after: list[bool] = []
        stats_after = stats.after_train_iter

        def look(*args: Any, **kwargs: Any) -> None:
            stats_after(*args, **kwargs)
            after.append(has_hooks(model))

        stats.after_train_iter = look
        make_runner(model, IMAGES, [stats], tmp_path).train()
        assert after == [False] * 4
        assert seen == [(False, False), (True, False), (False, False), (True, False)]

    def test_hooks_are_removed_after_a_failure(self, tmp_path: Path) -> None:
        def run(layers: nn.ModuleDict, x: Tensor) -> Tensor:
            layers["dcn"](x)
            raise ArithmeticError("stop")

        model = Network(run, dcn=dcn())
        with pytest.raises(ArithmeticError, match="stop"):
            make_runner(model, IMAGES, [stats_hook()], tmp_path).train()
        assert not has_hooks(model.layers)


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(interval=0), "interval must be an integer >= 1, got 0"),
            (dict(check_interval=1.5), "check_interval must be an integer >= 1, got 1.5"),
            (dict(percentiles=(50, 101)), r"percentiles must be numbers in \[0, 100\], got"),
            (dict(percentiles=()), r"percentiles must be numbers in \[0, 100\], got"),
        ],
    )
    def test_arguments(self, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            HOOKS.build(dict(type="mmdeform.OffsetStatsHook") | options)

    def test_a_model_without_deformable_layers(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="Network has no deformable layer"):
            make_runner(Network(conv=nn.Conv2d(2, 2, 1)), IMAGES, [stats_hook()], tmp_path).train()

    def test_a_pattern_that_matches_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"'backbone.*' matches no .*there are layers.dcn"):
            stats = stats_hook(layers="backbone.*")
            make_runner(Network(dcn=dcn()), IMAGES, [stats], tmp_path).train()

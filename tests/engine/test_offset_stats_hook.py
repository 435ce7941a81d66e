"""OffsetStatsHook reports what the layers sampled, and stops where numbers end."""

import json
import math
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

from mmdeform.engine.hooks import offset_statistics
from mmdeform.engine.hooks.finite_check import FiniteCheck
from mmdeform.engine.hooks.offset_statistics import OffsetStatistics
from mmdeform.layers import (
    DCNv3,
    DCNv4,
    DeformConv2d,
    DeformConv2dPack,
    DeformRoIPool,
    DeformRoIPoolPack,
    ModulatedDeformConv2dPack,
    MultiScaleDeformableAttention,
)
from mmdeform.layers.sampling import Sampling, sampled
from mmdeform.registry import HOOKS

from .training import Call, Network, has_hooks, make_runner

IMAGES = [torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(1)) for _ in range(4)]


def dcn(**options: Any) -> ModulatedDeformConv2dPack:
    """Offsets of lengths 0 to 8 and a saturated mask at one of 9 taps."""
    layer = ModulatedDeformConv2dPack(2, 2, 3, padding=1, **options)
    layer.conv_offset.bias.data[1:18:2] = torch.arange(9.0)  # x
    layer.conv_offset.bias.data[18] = 100.0
    return layer


def hook(**options: Any) -> Any:
    return HOOKS.build(dict(type="mmdeform.OffsetStatsHook", interval=1, **options))


def statistics(*samplings: Sampling, percentiles: tuple = (50, 95)) -> dict[str, float]:
    collected = OffsetStatistics()
    for sampling in samplings:
        collected.add(sampling)
    return collected.compute(percentiles)


class TestStatistics:
    def test_known_offsets(self) -> None:
        values = statistics(sampled(dcn(), (torch.zeros(1, 2, 6, 30),)), percentiles=(25, 100))
        assert list(values) == ["p25", "p100", "max", "outside", "mask_mean", "mask_saturated"]
        assert values["p25"] == 2 and values["p100"] == values["max"] == 8
        assert values["mask_mean"] == pytest.approx((8 * 0.5 + 1) / 9)
        assert values["mask_saturated"] == pytest.approx(1 / 9)

    def test_samples_outside(self) -> None:
        # Of 4 x 5 pixels those of the last column are moved by one: beyond the map.
        offset = torch.zeros(1, 2, 4, 5)
        offset[:, 1] = 1.0
        sampling = sampled(DeformConv2d(1, 1, 1), (torch.zeros(1, 1, 4, 5), offset))
        values = statistics(sampling)
        assert values["outside"] == pytest.approx(4 / 20) and "mask_mean" not in values

    def test_entropy(self) -> None:
        layer = DCNv3(4, 4, 3, padding=1)
        x = torch.randn(1, 4, 5, 5)
        assert statistics(sampled(layer, (x,)))["entropy"] == pytest.approx(1)
        layer.mask.bias.data[:2] = 50.0  # two taps of equal weight
        two = statistics(sampled(layer, (x,)))
        assert two["entropy"] == pytest.approx(math.log(2) / math.log(9))
        assert "mask_mean" not in two and "mask_saturated" not in two
        layer.mask.bias.data[:2] = torch.tensor([500.0, 0.0])
        assert statistics(sampled(layer, (x,)))["entropy"] == pytest.approx(0, abs=1e-6)

    def test_entropy_of_attention(self) -> None:
        layer = MultiScaleDeformableAttention(16, 2, 2, 3)
        inputs = dict(
            query=torch.randn(5, 1, 16),
            reference_points=torch.rand(1, 5, 2, 2),
            spatial_shapes=torch.tensor([[4, 4], [2, 2]]),
        )
        layer.attention_weights.bias.data.view(2, 2, 3)[:, 1] = -500.0  # the first level alone
        values = statistics(sampled(layer, (), inputs))
        assert values["entropy"] == pytest.approx(math.log(3) / math.log(6))
        assert values["max"] == pytest.approx(3)

    def test_unbounded_weights_have_no_saturation(self) -> None:
        values = statistics(sampled(DCNv4(4, 4, 3, padding=1), (torch.zeros(1, 4, 5, 5),)))
        assert values["mask_mean"] == pytest.approx(1 / 9)
        assert "mask_saturated" not in values and "entropy" not in values

    def test_calls_are_merged(self) -> None:
        layer = dcn()
        small, large = (sampled(layer, (torch.zeros(1, 2, 6, w),)) for w in (2, 40))
        merged, whole = statistics(small, large), statistics(large)
        share = (2 * statistics(small)["outside"] + 40 * whole["outside"]) / 42
        assert merged["outside"] == pytest.approx(share) and merged["outside"] != whole["outside"]
        assert merged["p50"] == 4 and merged["max"] == 8

    def test_no_samples(self) -> None:
        layer = DeformRoIPool((2, 2))
        empty = sampled(layer, (torch.zeros(1, 2, 6, 6), torch.zeros(0, 5)))
        assert statistics(empty) == {}

    def test_many_samples_are_drawn_in_proportion(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(offset_statistics, "MAX_SAMPLES", 2000)
        torch.manual_seed(3)
        sizes = (30_000, 1_000, 9_000)
        lengths = [torch.rand(size) + index for index, size in enumerate(sizes)]
        samplings = [
            Sampling(
                offset=torch.stack([length, torch.zeros_like(length)], -1),
                locations=torch.zeros(len(length), 2),
                grid=torch.zeros(2),
                size=torch.ones(2),
            )
            for length in lengths
        ]
        state = torch.get_rng_state()
        values = statistics(*samplings, percentiles=(50, 70, 90))
        assert torch.equal(torch.get_rng_state(), state)
        true = torch.cat(lengths)
        assert values["max"] == true.max()
        for percentile in (50, 70, 90):
            rank = (true < values[f"p{percentile}"]).float().mean()
            assert rank == pytest.approx(percentile / 100, abs=0.03)


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
        make_runner(Network(first=dcn()), IMAGES, [hook()], tmp_path, visualizer=visualizer).train()
        (path,) = tmp_path.rglob("events.out.*")
        assert b"offset/layers.first/p50" in path.read_bytes()

    def test_chosen_layers_and_layers_that_do_not_run(self, tmp_path: Path) -> None:
        model = Network(
            lambda layers, x: layers["a"](layers["plain"](x)), a=dcn(), b=dcn(), plain=dcn()
        )
        make_runner(model, IMAGES, [hook(layers="layers.[ab]")], tmp_path).train()
        text = next(tmp_path.rglob("*.log")).read_text()
        table = text[text.index("Offsets at iteration 1 ") :]
        assert "layers.a  " in table and "layers.plain  " not in table
        assert "without samples: layers.b" in table

    def test_several_calls_of_a_layer_count_together(self, tmp_path: Path) -> None:
        def run(layers: nn.ModuleDict, x: Tensor) -> Tensor:
            return layers["dcn"](x).mean() + layers["dcn"](x[..., :2]).mean()

        stats = hook(check_nan=False)
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

        make_runner(Network(run, dcn=dcn()), IMAGES, [hook()], tmp_path).train()
        assert next(tmp_path.rglob("*.log")).read_text().count("Offsets at iteration") == 4

    def test_distributed(self, tmp_path: Path, process_group: None) -> None:
        model = MMDistributedDataParallel(Network(first=dcn()))
        hooks = [hook(), dict(type="mmdeform.OffsetWarmupHook", iters=4)]
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

        plain, watched = train("plain", []), train("watched", [hook()])
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

        stats = hook(check_nan=False)
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
            make_runner(model, IMAGES, [hook()], tmp_path).train()
        assert not has_hooks(model.layers)


class TestFiniteCheck:
    def train(self, tmp_path: Path, model: nn.Module, break_it: Any, **options: Any) -> None:
        def at_iteration_3(runner: Any) -> None:
            if runner.iter == 2:
                with torch.no_grad():
                    break_it(model.layers)

        hooks = [hook(**options), Call(at_iteration_3)]
        make_runner(model, IMAGES, hooks, tmp_path).train()

    def network(self) -> Network:
        return Network(
            stem=nn.Conv2d(2, 2, 1), first=dcn(), second=DeformConv2dPack(2, 2, 3, padding=1)
        )

    @pytest.mark.parametrize(
        ("parameter", "expected"),
        [
            ("stem.bias", "first' .*: input x, offset, mask, output; finite: weights. 1 of"),
            (
                "first.conv_offset.bias",
                "first' .*: weights conv_offset.bias, offset; finite: input x, mask, output",
            ),
            ("first.weight", "first' .*: weights weight, output; finite: .*offset, mask"),
            ("second.weight", "second' .*: weights weight, output; finite: .*offset"),
        ],
    )
    @pytest.mark.parametrize("value", [float("nan"), float("-inf")])
    def test_names_layer_and_iteration(
        self, tmp_path: Path, parameter: str, expected: str, value: float
    ) -> None:
        def break_it(layers: nn.ModuleDict) -> None:
            layers.get_parameter(parameter).view(-1)[0] = value

        model = self.network()
        with pytest.raises(RuntimeError, match=f"iteration 3: NaN .* in layer 'layers.{expected}"):
            self.train(tmp_path, model, break_it)
        assert not has_hooks(model.layers)
        # The optimizer has not spread it.
        broken = [
            name for name, value in model.layers.named_parameters() if not value.isfinite().all()
        ]
        assert broken == [parameter]

    def test_masks_are_told_from_offsets(self, tmp_path: Path) -> None:
        def break_it(layers: nn.ModuleDict) -> None:
            layers["first"].conv_offset.bias[-1] = float("nan")

        expected = ": weights conv_offset.bias, mask, output; finite: input x, offset"
        with pytest.raises(RuntimeError, match=expected):
            self.train(tmp_path, self.network(), break_it)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_one_value_is_enough(self, value: float) -> None:
        def one(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[0, 3, 2, 2] = value
            return output

        layer = dcn()
        layer.conv_offset.register_forward_hook(one)
        check = FiniteCheck({"name": layer})
        check.watch()
        assert layer(IMAGES[0][None]).isfinite().all()
        assert "layer 'name' (ModulatedDeformConv2dPack): offset; finite" in check.report()

    def test_layers_without_samples(self) -> None:
        layer = DeformRoIPoolPack(2, 2, 4)
        check = FiniteCheck({"name": layer})
        check.watch()
        layer(IMAGES[0][None], torch.zeros(0, 5))
        assert check.report() is None

    def test_a_later_call_of_a_layer(self) -> None:
        layer = dcn()
        check = FiniteCheck({"name": layer})
        check.watch()
        for factor in (1, torch.nan, 1):
            layer(IMAGES[0][None] * factor)
        assert ": input x, offset, mask, output; finite: weights" in check.report()

    def test_offsets_as_an_input(self, tmp_path: Path) -> None:
        offset = torch.zeros(1, 18, 6, 6)
        model = Network(
            lambda layers, x: layers["conv"](x, offset=offset),
            conv=DeformConv2d(2, 2, 3, padding=1),
        )
        expected = "'layers.conv' .*: offset; finite: input x, weights, output"
        with pytest.raises(RuntimeError, match=expected):
            self.train(tmp_path, model, lambda _: offset[0, 0, 0].fill_(torch.inf))

    def test_a_failing_forward_pass_is_explained_in_the_log(self, tmp_path: Path) -> None:
        def run(layers: nn.ModuleDict, x: Tensor) -> Tensor:
            x = layers["dcn"](x)
            if not x.isfinite().all():
                raise ArithmeticError("invalid numeric entries")
            return x

        def break_it(layers: nn.ModuleDict) -> None:
            layers["dcn"].weight[0] = torch.nan

        with pytest.raises(ArithmeticError):
            self.train(tmp_path, Network(run, dcn=dcn()), break_it)
        text = next(tmp_path.rglob("*.log")).read_text()
        assert "ERROR" in text
        assert "iteration 3: NaN or infinite in layer 'layers.dcn'" in text

    def test_interval(self, tmp_path: Path) -> None:
        def break_it(layers: nn.ModuleDict) -> None:
            layers["first"].conv_offset.bias[0] = torch.nan

        with pytest.raises(RuntimeError, match="iteration 4"):
            self.train(tmp_path, self.network(), break_it, check_interval=2)

    def test_it_can_be_switched_off(self, tmp_path: Path) -> None:
        def break_it(layers: nn.ModuleDict) -> None:
            layers["second"].conv_offset.bias[0] = torch.nan

        self.train(tmp_path, self.network(), break_it, check_nan=False)
        assert "nan" in next(tmp_path.rglob("*.log")).read_text()


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
            make_runner(Network(conv=nn.Conv2d(2, 2, 1)), IMAGES, [hook()], tmp_path).train()

    def test_a_pattern_that_matches_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"'backbone.*' matches no .*there are layers.dcn"):
            stats = hook(layers="backbone.*")
            make_runner(Network(dcn=dcn()), IMAGES, [stats], tmp_path).train()

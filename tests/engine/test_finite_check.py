"""OffsetStatsHook stops where numbers end, and says where."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmcv.ops")

from mmdeform.engine.hooks.finite_check import FiniteCheck
from mmdeform.layers import (
    DeformConv2d,
    DeformConv2dPack,
    DeformRoIPoolPack,
)

from .training import IMAGES, Call, Network, dcn, has_hooks, make_runner, stats_hook


class TestFiniteCheck:
    def train(self, tmp_path: Path, model: nn.Module, break_it: Any, **options: Any) -> None:
        def at_iteration_3(runner: Any) -> None:
            if runner.iter == 2:
                with torch.no_grad():
                    break_it(model.layers)

        hooks = [stats_hook(**options), Call(at_iteration_3)]
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

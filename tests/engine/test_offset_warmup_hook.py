"""OffsetWarmupHook scales predicted offsets, and nothing else, by a factor of the iteration."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmcv.ops")
from mmcv.ops import DeformConv2dPack as MmcvDCN
from mmcv.ops import ModulatedDeformConv2dPack as MmcvDCNv2
from mmcv.ops import MultiScaleDeformableAttention as MmcvAttention
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from torch.utils.data import DataLoader

from mmdeform.layers import (
    DCNv3,
    DCNv4,
    DeformableAttention2d,
    DeformConv2d,
    DeformConv2dPack,
    DeformPSRoIPoolPack,
    ModulatedDeformConv2dPack,
    ModulatedDeformRoIPoolPack,
    MultiScaleDeformableAttention,
)
from mmdeform.layers.sampling import Sampling, sampled
from mmdeform.registry import HOOKS

from .training import Call, Network, has_hooks, make_runner

IMAGES = [torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(1)) for _ in range(8)]
ROIS = torch.tensor([[0.0, 1, 1, 6, 6], [0, 2, 0, 7, 5]])
MAP = torch.randn(1, 8, 8, 8)
ATTENTION = dict(
    query=torch.randn(5, 1, 16),
    value=torch.randn(20, 1, 16),
    reference_points=torch.rand(1, 5, 2, 2),
    spatial_shapes=torch.tensor([[4, 4], [2, 2]]),
)


def hook(**options: Any) -> Any:
    return HOOKS.build(dict(type="mmdeform.OffsetWarmupHook") | options)


def trained(layer: nn.Module) -> nn.Module:
    """With parameters that are nowhere the initial ones."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer.eval()


class Frozen(Network):
    """Samples of one layer in each forward call; nothing is learned."""

    def __init__(self, layer: nn.Module, inputs: dict[str, Any]) -> None:
        super().__init__(layer=layer)
        self.inputs = inputs
        self.samplings: list[Sampling] = []

    def forward(self, inputs: Tensor, mode: str = "tensor") -> Any:
        self.samplings.append(sampled(self.layers["layer"], (), self.inputs))
        output = self.layers["layer"](**self.inputs)
        return {"loss": output.sum() * 0} if mode == "loss" else [output]


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (DeformConv2dPack(8, 4, 3), dict(x=MAP)),
        (ModulatedDeformConv2dPack(8, 4, 3), dict(x=MAP)),
        (MmcvDCN(8, 4, 3), dict(x=MAP)),
        (MmcvDCNv2(8, 4, 3), dict(x=MAP)),
        (DCNv3(8, 4, 3, group=2), dict(x=MAP)),
        (DCNv4(8, 4, 3, group=2), dict(x=MAP)),
        # Of this range offsets are what is predicted; of others they pass through tanh or a clamp.
        (DeformableAttention2d(8, 2, 2, offset_range_factor=0, version="v1"), dict(x=MAP)),
        (MultiScaleDeformableAttention(16, 2, 2, 3), ATTENTION),
        (MmcvAttention(16, 2, 2, 3), ATTENTION),
        (ModulatedDeformRoIPoolPack(2, 8, 8), dict(input=MAP, rois=ROIS)),
        (ModulatedDeformRoIPoolPack(2, 8, 8, head="paper"), dict(input=MAP, rois=ROIS)),
        (DeformPSRoIPoolPack(8, 2, 1.0, 2), dict(input=MAP, rois=ROIS, features=MAP)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_factors(layer: nn.Module, inputs: dict[str, Any], tmp_path: Path) -> None:
    initial: Any = 0
    if "reference_points" in inputs:
        initial = sampled(type(layer)(16, 2, 2, 3), (), inputs).offset
    plain = sampled(trained(layer), (), inputs)
    model = Frozen(layer, inputs)
    optim = dict(optimizer=dict(type="SGD", lr=0.0))
    warmup = hook(iters=4, start=0.2)
    make_runner(model, IMAGES, [warmup], tmp_path, 6, optim_wrapper=optim).train()
    for factor, sampling in zip((0.2, 0.4, 0.6, 0.8, 1, 1), model.samplings, strict=True):
        expected = initial + factor * (plain.offset - initial)
        if factor == 1:
            assert torch.equal(sampling.offset, plain.offset)
        else:
            torch.testing.assert_close(sampling.offset, expected, atol=1e-5, rtol=1e-5)
        assert plain.mask is None or torch.equal(sampling.mask, plain.mask)


def dcn() -> ModulatedDeformConv2dPack:
    return trained(ModulatedDeformConv2dPack(2, 2, 3, padding=1)).train()


class TestTraining:
    def test_hooks_go_when_the_factor_is_1(self, tmp_path: Path) -> None:
        model = Network(dcn=dcn())
        seen: list[bool] = []
        watch = Call(lambda runner: seen.append(has_hooks(model)))
        make_runner(model, IMAGES, [hook(iters=3), watch], tmp_path, 5).train()
        assert seen == [True, True, True, False, False]

    def test_outputs_are_those_of_the_layer_with_scaled_offsets(self, tmp_path: Path) -> None:
        layer = dcn()
        with torch.no_grad():
            layer.conv_offset.weight[18:] = 0  # a mask of 0.5
            layer.conv_offset.bias[18:] = 0
            layer.bias.zero_()
            start = nn.functional.conv2d(IMAGES[0][None], layer.weight, padding=1) / 2
        model = Network(dcn=layer)
        make_runner(model, IMAGES, [hook()], tmp_path, 1).train()
        torch.testing.assert_close(model.outputs[0], start)
        assert not torch.allclose(layer(IMAGES[0][None]), start, atol=0.01)
        assert not has_hooks(model)  # also where training ends during the warm-up

    def test_resumed_training_goes_on(self, tmp_path: Path) -> None:
        def train(name: str, iterations: int, resume: bool) -> list[Tensor]:
            torch.manual_seed(0)
            model = Network(dcn=dcn())
            checkpoints = dict(checkpoint=dict(type="CheckpointHook", interval=1, by_epoch=False))
            runner = make_runner(
                model,
                IMAGES,
                [hook(iters=5)],
                tmp_path / name,
                iterations,
                resume=resume,
                default_hooks=checkpoints,
            )
            runner.train()
            return model.outputs

        whole = train("whole", 7, resume=False)
        train("parts", 3, resume=False)
        resumed = train("parts", 7, resume=True)
        assert len(resumed) == 4 and all(map(torch.equal, resumed, whole[3:]))
        train("late", 6, resume=False)
        assert torch.equal(train("late", 7, resume=True)[0], whole[6])
        logs = "".join(path.read_text() for path in (tmp_path / "late").rglob("*.log"))
        assert "resumed epoch: 0, iter: 6" in logs
        assert logs.count("OffsetWarmupHook scales") == 1  # not of the second training

    def test_validation_has_the_factor_of_training(self, tmp_path: Path) -> None:
        @METRICS.register_module(force=True)
        class Nothing(BaseMetric):
            def process(self, data_batch: Any, data_samples: Any) -> None:
                self.results.append(0)

            def compute_metrics(self, results: list) -> dict:
                return {}

        layer = trained(ModulatedDeformConv2dPack(8, 4, 3))
        model = Frozen(layer, dict(x=MAP))
        plain = sampled(layer, (MAP,)).offset
        runner = make_runner(
            model,
            IMAGES,
            [hook(iters=4)],
            tmp_path,
            2,
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.0)),
            train_cfg=dict(by_epoch=False, max_iters=2, val_interval=2),
            val_cfg=dict(),
            val_dataloader=DataLoader([dict(inputs=IMAGES[0])]),
            val_evaluator=dict(type="Nothing"),
        )
        runner.train()
        factors = [float((sampling.offset / plain).mean()) for sampling in model.samplings]
        assert factors == pytest.approx([0, 0.25, 0.25])

    def test_chosen_layers(self, tmp_path: Path) -> None:
        model = Network(a=dcn(), b=dcn())
        hooked: list[tuple[bool, bool]] = []
        watch = Call(
            lambda _: hooked.append((has_hooks(model.layers["a"]), has_hooks(model.layers["b"])))
        )
        make_runner(model, IMAGES, [hook(layers="*.b"), watch], tmp_path, 1).train()
        assert hooked == [(False, True)]


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(iters=0), "iters must be an integer >= 1, got 0"),
            (dict(start=1.5), r"start must be in \[0, 1\], got 1.5"),
        ],
    )
    def test_arguments(self, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            hook(**options)

    def test_layers_that_predict_nothing(self, tmp_path: Path) -> None:
        model = Network(
            lambda layers, x: layers["conv"](x, x), conv=DeformConv2d(2, 2, 1), plain=dcn()
        )
        message = "none of these layers predicts its offsets, they are inputs: layers.conv"
        with pytest.raises(ValueError, match=message):
            make_runner(model, IMAGES, [hook(layers="*.conv")], tmp_path).train()

    def test_a_model_without_deformable_layers(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="Network has no deformable layer"):
            make_runner(Network(conv=nn.Conv2d(2, 2, 1)), IMAGES, [hook()], tmp_path).train()

"""Layers are found by their names, and watching them changes nothing."""

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("mmcv.ops")
from mmcv.ops import modulated_deform_conv as mmcv_v2

from mmdeform.layers import (
    DCNv3,
    DeformConv2dPack,
    DeformRoIPoolPack,
    ModulatedDeformConv2dPack,
)
from mmdeform.layers.sampling import (
    Sampling,
    deformable_layers,
    is_deformable,
    sampled,
    watch_sampling,
)


class TestWatching:
    def test_nothing_changes(self) -> None:
        def model() -> nn.Module:
            torch.manual_seed(0)
            layers = [
                ModulatedDeformConv2dPack(4, 16, 3, padding=1),
                DCNv3(16, 4, 3, padding=1, norm_layer="BN"),
                nn.Dropout(0.5),
            ]
            model = nn.Sequential(*layers)
            nn.init.normal_(model[0].conv_offset.weight)
            return model

        plain, watched = model(), model()
        seen: list[tuple[str, Sampling]] = []
        handles = watch_sampling(
            deformable_layers(watched), lambda name, sampling: seen.append((name, sampling))
        )
        x = torch.randn(2, 4, 6, 6)
        results = []
        for network in (plain, watched):
            torch.manual_seed(1)
            output = network(x)
            output.square().sum().backward()
            results.append((output, torch.rand(3)))
        for got, expected in zip(results[1], results[0], strict=True):
            assert torch.equal(got, expected)
        for (name, got), expected in zip(
            watched.state_dict().items(), plain.state_dict().values(), strict=True
        ):
            assert torch.equal(got, expected), name
        for got, expected in zip(watched.parameters(), plain.parameters(), strict=True):
            assert torch.equal(got.grad, expected.grad)
        assert watched[1].dw_conv[1][0].track_running_stats
        assert [name for name, _ in seen] == ["0", "1"]
        assert not any(sampling.locations.requires_grad for _, sampling in seen)

        for handle in handles:
            handle.remove()
        watched(x)
        assert len(seen) == 2

    def test_statistics_are_those_of_the_forward_call(self) -> None:
        layer = DCNv3(4, 4, 3, padding=1, norm_layer="BN")
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
        x = torch.randn(2, 4, 6, 6) * 5 + 3
        of_batch = sampled(layer, (x,)).offset
        assert not torch.allclose(of_batch, sampled(layer.eval(), (x,)).offset)

    def test_half_precision_locations_are_fp32(self) -> None:
        layer = ModulatedDeformConv2dPack(2, 2, 3, padding=1).bfloat16()
        sampling = sampled(layer, (torch.zeros(1, 2, 4, 300, dtype=torch.bfloat16),))
        assert sampling.locations.dtype == sampling.mask.dtype == torch.float32
        assert sampling.locations[0, 0, 4, 0, 299, 0] == 299


class TestFinding:
    MODEL = nn.ModuleDict(
        {
            "layer2": nn.ModuleDict(
                {"conv1": nn.Conv2d(1, 1, 1), "conv2": DeformConv2dPack(1, 1, 3)}
            ),
            "layer3": nn.ModuleDict({"conv2": mmcv_v2.ModulatedDeformConv2dPack(1, 1, 3)}),
            "head": DeformRoIPoolPack(2, 1),
        }
    )

    def test_all_layers(self) -> None:
        assert list(deformable_layers(self.MODEL)) == ["layer2.conv2", "layer3.conv2", "head"]
        assert is_deformable(self.MODEL["head"]) and not is_deformable(self.MODEL["layer2"])

    @pytest.mark.parametrize(
        ("layers", "expected"),
        [
            ("layer*.**", ["layer2.conv2", "layer3.conv2"]),
            ("**.conv2", ["layer2.conv2", "layer3.conv2"]),
            ("layer[34].conv?", ["layer3.conv2"]),
            (["head", "layer2.*"], ["layer2.conv2", "head"]),
        ],
    )
    def test_some_layers(self, layers: Any, expected: list[str]) -> None:
        assert list(deformable_layers(self.MODEL, layers)) == expected

    def test_a_pattern_that_matches_nothing(self) -> None:
        with pytest.raises(
            ValueError, match=r"'layer\*' matches no .*there are layer2.conv2, layer3.conv2, head"
        ):
            deformable_layers(self.MODEL, ["head", "layer*"])

    def test_a_model_without_deformable_layers(self) -> None:
        with pytest.raises(ValueError, match="Linear has no deformable layer"):
            deformable_layers(nn.Linear(1, 1))

    def test_other_modules(self) -> None:
        with pytest.raises(TypeError, match="must be a deformable layer, got Linear"):
            sampled(nn.Linear(1, 1), (torch.zeros(1),))

    def test_subclasses(self) -> None:
        class Own(mmcv_v2.ModulatedDeformConv2dPack):
            pass

        assert is_deformable(layer := Own(1, 1, 3))
        assert sampled(layer, (torch.zeros(1, 1, 4, 4),)).locations.shape == (1, 1, 9, 2, 2, 2)

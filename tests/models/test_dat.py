"""DAT and DAT++: published sizes, any image, training, options, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("mmcv.ops")
from mmengine.analysis import FlopAnalyzer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmdeform.models import DAT
from mmdeform.registry import MODELS

from .backbones import autocast, cast, count, gradients
from .small_dat import SPECS, small_dat

VERSIONS = tuple(SPECS)

# (version, arch): parameters of the classifier, and products and convolutions at 224, in GMACs.
PUBLISHED = {
    ("v1", "tiny"): (28_319_138, 4.5635),
    ("v1", "small"): (49_700_402, 8.9587),
    ("v1", "base"): (87_881_632, 15.7214),
    ("pp", "tiny"): (23_962_876, 4.2590),
    ("pp", "small"): (53_127_366, 9.3825),
    ("pp", "base"): (93_690_640, 16.5020),
}


class TestPublished:
    """On the meta device, which computes shapes and no numbers."""

    @pytest.mark.parametrize(("version", "arch"), PUBLISHED)
    def test_classifier(self, version: str, arch: str) -> None:
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            model = DAT(arch, version, num_classes=1000, backend="reference").eval()
            logits = model(torch.randn(1, 3, 224, 224))
        parameters, gmacs = PUBLISHED[version, arch]
        assert logits.shape == (1, 1000)
        assert count(model) == parameters
        assert round(counter.get_total_flops() / 2e9, 4) == gmacs

    @pytest.mark.parametrize(("version", "parameters"), [("v1", 27_551_482), ("pp", 23_450_772)])
    def test_backbone(self, version: str, parameters: int) -> None:
        with torch.device("meta"), torch.no_grad():
            model = MODELS.build(dict(type="mmdeform.DAT", version=version))
            maps = model(torch.randn(2, 3, 224, 224))
        assert count(model) == parameters
        dims = (96, 192, 384, 768) if version == "v1" else (64, 128, 256, 512)
        shapes = [(2, dim, size, size) for dim, size in zip(dims, (56, 28, 14, 7), strict=True)]
        assert [tuple(y.shape) for y in maps] == shapes

    @pytest.mark.parametrize(
        ("version", "rates"), [("v1", (0, 0.2 / 11, 0.2)), ("pp", (0, 0.2 / 25, 0.2))]
    )
    def test_drop_path_rises(self, version: str, rates: tuple[float, ...]) -> None:
        with torch.device("meta"):
            model = DAT(version=version)
        got = [path.drop_prob for stage in model.stages for path in stage.drop_path]
        assert (got[0], got[1], got[-1]) == pytest.approx(rates)
        assert got == sorted(got)

    def test_names(self) -> None:
        """Those of each kind of block, as published; there are no buffers among them."""
        names = set(
            small_dat("pp", stage_specs=("LS", "N", "P", "D"), layer_scale=0.1).state_dict()
        )
        names |= set(small_dat("v1", num_classes=3).state_dict())
        kinds = {name.partition("stages.")[2].partition(".attns.")[2] for name in names} - {""}
        weights = {f"{module}.{kind}" for module in (
            "0.proj_qkv", "0.proj_out", "0.qkv", "0.proj", "0.q", "0.kv", "0.proj_ds.0",
            "0.proj_ds.1.norm", "0.proj_q", "0.proj_k", "0.proj_v", "0.conv_offset.0",
            "0.conv_offset.1.norm",
        ) for kind in ("weight", "bias")}  # fmt: skip
        tables = {"0.relative_position_bias_table", "0.rpb", "0.rpe_table"}
        first = {kind for kind in kinds if kind.startswith("0.")}
        assert first == weights | tables | {"0.conv_offset.3.weight"}
        assert {
            "patch_proj.0.weight", "patch_proj.1.norm.weight", "patch_proj.3.bias",
            "patch_proj.4.norm.bias", "stages.0.proj.weight", "stages.0.layer_norms.3.norm.weight",
            "stages.0.layer_scales.3.weight", "stages.0.local_perception_units.1.weight",
            "stages.0.mlps.1.linear1.0.weight", "stages.0.mlps.1.dwc.bias",
            "stages.0.mlps.1.linear2.0.bias", "stages.0.mlps.1.chunk.linear1.weight",
            "stages.0.mlps.1.chunk.linear2.bias", "down_projs.2.0.weight",
            "down_projs.2.1.norm.bias", "norms.3.norm.weight", "cls_norm.norm.weight",
            "cls_head.bias",
        } <= names  # fmt: skip
        assert "down_projs.2.0.bias" not in names

    def test_initial_tables(self) -> None:
        model = small_dat("pp", stage_specs=("LNDP", "L", "L", "L"), img_size=224)
        window, neighbor, deformable, _ = model.stages[0].attns
        for table, std in (
            (window.relative_position_bias_table, 0.01),
            (neighbor.rpb, 0.02),
            (deformable.rpe_table, 0.01),
        ):
            assert table.std().item() == pytest.approx(std, rel=0.25)


class TestSizes:
    @pytest.mark.parametrize("size", [(64, 64), (37, 91), (64, 50), (5, 7), (1, 130)], ids=str)
    @pytest.mark.parametrize("version", VERSIONS)
    def test_any_image(self, version: str, size: tuple[int, int]) -> None:
        model = small_dat(version)
        image = torch.randn(2, 3, *size, requires_grad=True)
        maps = model(image)
        assert [tuple(y.shape) for y in maps] == [
            (2, dim, -(-size[0] // step), -(-size[1] // step))
            for dim, step in zip((16, 16, 32, 32), (4, 8, 16, 32), strict=True)
        ]
        assert all(y.is_contiguous() and y.isfinite().all() for y in maps)
        sum(y.square().mean() for y in maps).backward()
        for name, parameter in [*model.named_parameters(), ("image", image)]:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name

    @pytest.mark.parametrize("version", VERSIONS)
    def test_images_of_a_batch_do_not_mix(self, version: str) -> None:
        model = small_dat(version).double().eval()
        images = torch.randn(3, 3, 45, 70, dtype=torch.float64)
        together = model(images)
        for index, image in enumerate(images):
            for both, alone in zip(together, model(image[None]), strict=True):
                torch.testing.assert_close(both[index], alone[0])

    @pytest.mark.parametrize("version", VERSIONS)
    def test_empty_batch(self, version: str) -> None:
        maps = small_dat(version)(torch.zeros(0, 3, 64, 64))
        assert [y.shape[0] for y in maps] == [0] * 4

    def test_v1_fills_the_last_patch_with_zeros(self) -> None:
        model = small_dat("v1").eval()
        image = torch.randn(1, 3, 62, 61)
        filled = nn.functional.pad(image, (0, 3, 0, 2))
        for a, b in zip(model(image), model(filled), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


class TestOptions:
    def test_classifier(self) -> None:
        model = small_dat("v1", num_classes=5).eval()
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
        assert not hasattr(model, "norms")

    def test_out_indices(self) -> None:
        everything = small_dat("pp").eval()
        model = small_dat("pp", out_indices=(0, 2)).eval()
        assert len(model.stages) == 3 and len(model.down_projs) == 2
        assert "norms.1.norm.weight" not in model.state_dict()
        missing = model.load_state_dict(everything.state_dict(), strict=False).missing_keys
        assert missing == []
        image = torch.randn(1, 3, 64, 64)
        first, second = model(image)
        expected = everything(image)
        assert torch.equal(first, expected[0]) and torch.equal(second, expected[2])

    @pytest.mark.parametrize("version", VERSIONS)
    @pytest.mark.parametrize("frozen", [-1, 0, 1, 3])
    def test_frozen_stages(self, version: str, frozen: int) -> None:
        model = small_dat(version, frozen_stages=frozen, drop_rate=0.1)
        assert model.train() is model
        still = {name for name, p in model.named_parameters() if not p.requires_grad}
        expected = []
        if frozen >= 0:
            expected = ["patch_proj."] + [f"{m}.{i}." for m in ("stages", "norms")
                                          for i in range(frozen)]  # fmt: skip
            expected += [f"down_projs.{i}." for i in range(frozen - 1)]
        names = dict(model.named_parameters())
        assert still == {name for name in names if name.startswith(tuple(expected))}
        assert (frozen < 0) == (not still)
        training = [stage.mlps[0].training for stage in model.stages]
        assert training == [index >= frozen for index in range(4)]
        sum(y.sum() for y in model(torch.randn(1, 3, 64, 64))).backward()
        assert all((p.grad is None) == (name in still) for name, p in names.items())

    def test_one_value_serves_all_stages(self) -> None:
        model = small_dat("v1", position_bias="depthwise", stage_specs="D", lpu=(1, 0, 0, 0))
        assert all(isinstance(stage.attns[0].rpe_table, nn.Conv2d) for stage in model.stages)
        assert [len(stage.local_perception_units) for stage in model.stages] == [1, 0, 0, 0]

    def test_none_is_a_value(self) -> None:
        model = small_dat("v1", position_bias=None, stage_specs="D")
        assert [stage.attns[0].position_bias for stage in model.stages] == [None] * 4

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(arch="huge"), r"arch: expected one of \('tiny', 'small', 'base'\), got 'huge'"),
            (dict(version="v2"), r"version: expected one of \('v1', 'pp'\), got 'v2'"),
            (dict(stage_specs=("L", "LX", "L", "L")), r"stage_specs.*L \(window.*S \(shifted.*"
             r"D \(deform.*N \(neigh.*P \(.*, got 'LX'"),
            (dict(stage_specs=("LS", "", "L", "L")), r"stage_specs\[1\]: .*got ''"),
            (dict(stage_specs=("LS", "LS")), r"stage_specs: expected 4 values.*got 2"),
            (dict(depths=(2, 2, 2, 2)), r"depths: expected \(2, 2, 6, 2\), .*got \(2, 2, 2, 2\)"),
            (dict(dims=(96, 192, 384, 770)), r"num_heads\[3\]: .*dims\[3\] = 770, got 24"),
            (dict(num_heads=0), r"num_heads\[0\]: .*dims\[0\] = 96, got 0"),
            (dict(num_groups=(1, 2, 5, 6)), r"num_groups\[2\]: .*num_heads\[2\] = 12, got 5"),
            (dict(windows=7), r"DAT has no argument 'windows'; .*'window_sizes'"),
            (dict(out_indices=(0, 4)), r"out_indices: .*0 to 3, got \(0, 4\)"),
            (dict(out_indices=()), r"out_indices: .*got \(\)"),
            (dict(frozen_stages=5), r"frozen_stages: .*got 5"),
            (dict(num_classes=-1), r"num_classes: .*got -1"),
            (dict(stage_specs="N", neighborhood_sizes=4), r"kernel_size: .*odd.*got 4"),
            (dict(stage_specs="S", window_sizes=1), r"window_size: .*2.*got 1"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )  # fmt: skip
    def test_errors(self, options: dict[str, Any], message: str) -> None:
        with torch.device("meta"), pytest.raises(ValueError, match=message):
            DAT(**options)

    def test_depths_may_repeat_the_specs(self) -> None:
        with torch.device("meta"):
            model = DAT(depths=[2, 2, 6, 2])
        assert [len(stage.attns) for stage in model.stages] == [2, 2, 6, 2]


class TestTraining:
    @pytest.mark.parametrize("version", VERSIONS)
    def test_activation_checkpointing(self, version: str) -> None:
        options = dict(drop_rate=0.1, drop_path_rate=0.3, attn_drop_rate=0.1)
        model = small_dat(version, **options)
        saving = small_dat(version, with_cp=True, **options)
        saving.load_state_dict(model.state_dict())
        image = torch.randn(2, 3, 64, 64)
        (expected, kept), (got, kept_less) = gradients(model, image), gradients(saving, image)
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert kept_less < kept / 2
        assert kept_less < kept - 2**20

    def test_dropout_is_off_in_evaluation(self) -> None:
        model = small_dat("pp", drop_rate=0.3, drop_path_rate=0.3, attn_drop_rate=0.3).eval()
        image = torch.randn(2, 3, 64, 64)
        assert torch.equal(model(image)[3], model(image)[3])
        model.train()
        assert not torch.equal(model(image)[0], model(image)[0])

    @pytest.mark.parametrize("version", VERSIONS)
    def test_learns(self, version: str) -> None:
        model = small_dat(version, num_classes=2)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 1, 0])
        losses = []
        for _ in range(12):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.3 < losses[0]


@pytest.mark.parametrize(
    ("call", "tolerance"),
    [
        (cast(torch.bfloat16), 0.1),
        (cast(torch.float16), 0.02),
        (autocast(torch.bfloat16), 0.1),
        (autocast(torch.float16), 0.02),
    ],
    ids=["bf16", "fp16", "autocast-bf16", "autocast-fp16"],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_half_precision(version: str, call: Callable, tolerance: float) -> None:
    model = small_dat(version)
    image = torch.randn(1, 3, 64, 50)
    expected = [y.detach() for y in model(image)]
    maps = call(model, image)
    for y, exact in zip(maps, expected, strict=True):
        assert (y.float() - exact).square().mean().sqrt() < tolerance * exact.std()
    sum(y.float().square().mean() for y in maps).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.slow
def test_compiles() -> None:
    """Every kind of block, forward and backward, as one graph."""
    model = small_dat("pp", stage_specs=("LSNPD", "D", "D", "D"), out_indices=(0,))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    image = torch.randn(1, 3, 64, 50)
    for a, b in zip(gradients(compiled, image)[0], gradients(model, image)[0], strict=True):
        torch.testing.assert_close(a, b)


def test_mmengine_counts_all_products() -> None:
    """mmdet's get_flops looks into a traced graph with this counter."""
    specs, image = ("LN", "S", "D", "D"), torch.randn(1, 3, 64, 64)
    fused = FlopAnalyzer(small_dat("pp", stage_specs=specs).eval(), image).by_operator()
    assert fused["dat_attn"] > 0
    model = small_dat("pp", stage_specs=specs, backend="reference").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    counts = FlopAnalyzer(model, image).by_operator()
    products = sum(counts[name] for name in ("conv", "linear", "matmul"))
    assert 2 * products == counter.get_total_flops()

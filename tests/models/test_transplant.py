"""Replacing modules by config: selection, arguments, spelling, errors."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet")
import mmcv.ops
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks import DropPath
from mmcv.cnn.bricks.transformer import MultiheadAttention
from mmdet.apis import init_detector
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmdeform import layers
from mmdeform.models.transplant.select import select

from .small_retinanet import (
    RULE,
    build,
    conv,
    retinanet,
    transplant,
)


class TestSelect:
    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [
            ("layers.0.conv1", ["layers.0.conv1"]),
            ("layers.*.conv[12]", [f"layers.{i}.conv{j}" for i in range(3) for j in (1, 2)]),
            ("layers.[!0].conv?", [f"layers.{i}.conv{j}" for i in (1, 2) for j in (1, 2)]),
            ("**.conv1", ["layers.0.conv1", "layers.1.conv1", "layers.2.conv1", "conv1"]),
            ("layers.**.conv1", [f"layers.{i}.conv1" for i in range(3)]),
            (["conv1", "layers.1.*1"], ["layers.1.conv1", "conv1"]),
            ("layers.2.**", ["layers.2", "layers.2.conv1", "layers.2.conv2"]),
            ("*", ["layers", "conv1"]),
        ],
    )
    def test_pattern(self, pattern: str | list[str], expected: list[str]) -> None:
        blocks = [nn.ModuleDict(dict(conv1=nn.ReLU(), conv2=nn.ReLU())) for _ in range(3)]
        model = nn.ModuleDict(dict(layers=nn.ModuleList(blocks), conv1=nn.ReLU()))
        assert select(model, pattern) == expected

    @pytest.mark.parametrize(
        ("pattern", "message"),
        [
            (
                "backbone.layer[34].*.conv9",
                r"rules\[0\]: 'backbone.layer\[34\].\*.conv9' selects no module: there is no "
                r"'conv9' in 'backbone.layer\[34\].\*', which has conv1 \(Conv2d\), conv2 ",
            ),
            ("backbone.layer5.*", r"no 'layer5' in 'backbone', which has layer1 \(ResLayer\)"),
            ("bakbone.**.conv2", r"no 'bakbone' in RetinaNet, which has backbone \(ResNet\)"),
            ("backbone.conv1.x", r"there is nothing in 'backbone.conv1' \(Conv2d\)"),
            (
                "**.cls_conv",
                r"no 'cls_conv' in '\*\*', which has cls_convs \(ModuleList\), .* more",
            ),
            ("Backbone", r"no 'Backbone' in RetinaNet"),
            (["backbone.conv1", "nek"], r"'nek' selects no module: .* neck \(FPN\)"),
        ],
    )
    def test_nothing_selected_lists_what_exists(self, pattern: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message) as error:
            build(retinanet(), dict(select=pattern, type="mmdeform.DCNv2"))
        assert len(str(error.value)) < 1000

    @pytest.mark.parametrize(
        ("first", "second", "message"),
        [
            ("backbone.conv1", "**.conv1", r"rules\[1\] and rules\[0\] .* 'backbone.conv1'"),
            ("neck.fpn_convs.*.conv", "neck.fpn_convs.0", "is part of 'neck.fpn_convs.0'"),
            ("backbone.layer1", "backbone.layer1.0.conv1", "is part of 'backbone.layer1'"),
        ],
    )
    def test_two_rules_must_not_meet(self, first: str, second: str, message: str) -> None:
        rules = [dict(select=pattern, type=nn.Identity) for pattern in (first, second)]
        with pytest.raises(ValueError, match=message):
            build(retinanet(), *rules)


class TestArguments:
    def test_of_a_convolution(self) -> None:
        model = conv(8, 12, (3, 5), (2, 1), (1, 2), (1, 3), groups=4, bias=False)
        new = transplant(model, dict(select="conv", type="mmdeform.DCNv2", deform_groups=2)).conv
        old = nn.Conv2d(8, 12, (3, 5), (2, 1), (1, 2), (1, 3), groups=4, bias=False)
        x = torch.randn(1, 8, 9, 9)
        assert new(x).shape == old(x).shape
        assert (new.groups, new.deform_groups, new.bias) == (4, 2, None)
        # Offsets are zero and the mask is one half.
        torch.testing.assert_close(2 * new(x), nn.functional.conv2d(
            x, new.weight, None, (2, 1), (1, 2), (1, 3), 4
        ))  # fmt: skip

    @pytest.mark.parametrize("bias", [True, False])
    def test_bias(self, bias: bool) -> None:
        new = transplant(conv(4, 4, 1, bias=bias), dict(select="conv", type="mmdeform.DCN")).conv
        assert (new.bias is not None) is bias

    def test_rule_overrides(self) -> None:
        rule = dict(select="conv", type="mmdeform.DCNv2", bias=False, padding=2, dilation=2)
        new = transplant(conv(4, 4, 3, padding=1), rule).conv
        assert (new.bias, new.padding, new.dilation) == (None, (2, 2), (2, 2))

    def test_of_attention(self) -> None:
        old = mmcv.ops.MultiScaleDeformableAttention(
            32, 4, 3, 2, dropout=0.3, batch_first=True, value_proj_ratio=0.5
        )
        rule = dict(select="a", type="mmdeform.MultiScaleDeformableAttention", num_points=5)
        new = transplant(nn.ModuleDict(dict(a=old)), rule).a
        assert (new.embed_dims, new.num_heads, new.num_levels, new.num_points) == (32, 4, 3, 5)
        assert (new.dropout.p, new.batch_first) == (0.3, True)
        assert new.value_proj.weight is old.value_proj.weight and len(new.value_proj.weight) == 16

    @pytest.mark.parametrize(
        "layer", [None, dict(type="Dropout", drop_prob=0.2), dict(type="DropPath", drop_prob=0.2)]
    )
    def test_of_mmcvs_plain_attention(self, layer: dict | None) -> None:
        old = MultiheadAttention(16, 2, 0.1, 0.3, dropout_layer=layer, batch_first=True)
        rule = dict(select="a", type=type("Other", (MultiheadAttention,), {}))
        new = transplant(nn.ModuleDict(dict(a=old)), rule).a
        assert (new.attn.dropout, new.proj_drop.p, new.batch_first) == (0.1, 0.3, True)
        assert type(new.dropout_layer) is type(old.dropout_layer)
        if isinstance(new.dropout_layer, DropPath):
            assert new.dropout_layer.drop_prob == 0.2
        assert set(dict(new.named_parameters())) == set(dict(old.named_parameters()))

    def test_rule_serves_many_modules(self) -> None:
        """mmcv's attention writes into the dict that it is given."""
        layer = dict(type="Dropout", drop_prob=0.2)
        rule = dict(select="*", type="MultiheadAttention", dropout_layer=layer, dropout=0.4)
        olds = [MultiheadAttention(16, 2, dropout_layer=dict(layer)) for _ in range(2)]
        model = transplant(nn.ModuleList(olds), rule)
        assert [new.dropout_layer.p for new in model] == [0.4, 0.4] and layer["drop_prob"] == 0.2

    def test_of_torchs_attention(self) -> None:
        model = nn.ModuleDict(dict(a=nn.MultiheadAttention(24, 3, batch_first=True)))
        rule = dict(select="a", type="mmdeform.MultiScaleDeformableAttention")
        new = transplant(model, rule).a
        assert (new.embed_dims, new.num_heads, new.batch_first) == (24, 3, True)

    def test_of_roi_layers(self) -> None:
        model = nn.ModuleDict(dict(pool=mmcv.ops.RoIAlign(7, 0.25, 2)))
        new = transplant(
            model, dict(select="pool", type="mmdeform.DeformRoIPoolPack", output_channels=4)
        ).pool
        assert (new.output_size, new.spatial_scale, new.sampling_ratio) == ((7, 7), 0.25, 2)

    @pytest.mark.parametrize("kind", ["torch.nn.Conv2d", nn.Conv2d, "Conv2d"])
    def test_type_may_be_anything_that_a_config_may_name(self, kind: Any) -> None:
        model = conv(4, 4, 3, padding="same", padding_mode="reflect")
        new = transplant(model, dict(select="conv", type=kind, bias=False)).conv
        assert type(new) is nn.Conv2d
        assert (new.padding, new.padding_mode, new.bias) == ("same", "reflect", None)

    def test_padding_valid_is_zero(self) -> None:
        new = transplant(
            conv(4, 4, 3, padding="valid"), dict(select="conv", type="DCN", bias=False)
        )
        assert new.conv.padding == (0, 0)

    def test_neutral_value_in_the_rule_lets_an_argument_go(self) -> None:
        rule = dict(select="conv", type="mmdeform.DCNv2", padding_mode="zeros")
        new = transplant(conv(4, 4, 3, padding=1, padding_mode="circular"), rule).conv
        assert type(new) is layers.ModulatedDeformConv2dPack and new.padding == (1, 1)

    @pytest.mark.parametrize(
        ("old", "rule", "message"),
        [
            (
                nn.Conv2d(4, 4, 3, padding_mode="circular"),
                dict(),
                r"rules\[0\], x \(Conv2d\): ModulatedDeformConv2dPack has no 'padding_mode', but "
                r"Conv2d has padding_mode='circular'; give padding_mode='zeros' in the rule",
            ),
            (
                nn.Conv2d(4, 4, 3, padding_mode="circular"),
                dict(padding_mode="reflect"),
                "unexpected keyword argument 'padding_mode'",
            ),
            (nn.Conv2d(4, 4, 3, padding="same"), dict(), "padding='same' cannot be kept"),
            (nn.ConvTranspose2d(4, 4, 3), dict(), "only one of ConvTranspose2d and Modulated"),
            (
                nn.ConvTranspose2d(4, 4, 3, 2, output_padding=1),
                dict(),
                r"ConvTranspose2d has output_padding=\(1, 1\)",
            ),
            (
                nn.Linear(4, 4),
                dict(),
                r"x \(Linear\): .* needs 'in_channels', of which Linear knows nothing; .* "
                r"in_channels=",
            ),
            (nn.Conv1d(4, 4, 3), dict(), r"x \(Conv1d\): Modulated.*\(deform_groups=1, .* fails"),
            (nn.Conv2d(4, 4, 3), dict(deform_groups=3), "must be divisible by deform_groups"),
            (nn.Conv2d(4, 4, 3), dict(deform_group=2), "keyword argument 'deform_group'"),
            (nn.Conv2d(4, 4, 3, groups=4), dict(type="mmdeform.DCNv4"), "groups must be 1"),
        ],
    )
    def test_what_does_not_fit_is_an_error(self, old: nn.Module, rule: dict, message: str) -> None:
        rule = {"select": "x", "type": "mmdeform.DCNv2", "deform_groups": 1, **rule}
        if rule["type"] == "mmdeform.DCNv4":
            del rule["deform_groups"]
        with pytest.raises(ValueError, match=message):
            transplant(nn.ModuleDict(dict(x=old)), rule)

    @pytest.mark.parametrize(
        "norm", [nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm]
    )
    def test_hooks_are_an_error(self, norm: Any) -> None:
        model = nn.ModuleDict(dict(x=norm(nn.Conv2d(4, 4, 3))))
        with pytest.raises(ValueError, match="hooks, such as spectral_norm, which cannot be kept"):
            transplant(model, dict(select="x", type="mmdeform.DCNv2"))

    def test_module_is_no_argument(self) -> None:
        class Pooling(nn.Module):
            def __init__(self, conv: int = 3) -> None:
                super().__init__()

        old = ConvModule(4, 4, 3)
        with pytest.raises(ValueError, match="'conv' of Pooling cannot be told from the module"):
            transplant(nn.ModuleDict(dict(x=old)), dict(select="x", type=Pooling))
        assert isinstance(
            transplant(nn.ModuleDict(dict(x=old)), dict(select="x", type=Pooling, conv=1)).x,
            Pooling,
        )


class TestModelAndRules:
    @pytest.mark.parametrize("kind", ["RetinaNet", "mmdet.RetinaNet"])
    def test_type_alone(self, kind: str) -> None:
        init_default_scope("mmdet")
        cfg = dict(retinanet(), type="mmdeform.Transplant", model=kind, rules=[RULE])
        rule = copy.deepcopy(RULE)
        detector = MODELS.build(cfg)
        assert type(detector).__name__ == "RetinaNet" and cfg["rules"] == [rule]
        assert type(detector.backbone.layer3[0].conv2) is layers.ModulatedDeformConv2dPack

    def test_without_rules_it_is_the_plain_detector(self) -> None:
        cfg = dict(retinanet(), type="mmdeform.Transplant", model="RetinaNet", rules=[])
        detector = build(cfg)
        assert "init_weights" not in vars(detector)
        assert detector.state_dict().keys() == build(retinanet()).state_dict().keys()

    @pytest.mark.parametrize("whole", [True, False])
    def test_data_preprocessor_of_the_runner(self, whole: bool) -> None:
        init_default_scope("mmdet")
        model = retinanet()
        del model["data_preprocessor"]
        preprocessor = dict(type="DetDataPreprocessor", pad_size_divisor=64)
        cfg = dict(model=model) if whole else dict(model, model="RetinaNet")
        cfg.update(type="mmdeform.Transplant", rules=[RULE], data_preprocessor=preprocessor)
        assert MODELS.build(cfg).data_preprocessor.pad_size_divisor == 64
        assert "data_preprocessor" not in model

    @pytest.mark.parametrize(
        ("cfg", "error", "message"),
        [
            (dict(rules=[]), TypeError, "expected the type of the detector, model='FasterRCNN'"),
            (
                dict(retinanet(), model=retinanet(), rules=[]),
                TypeError,
                "other arguments for one: backbone, .* _delete_=True .* only the type",
            ),
            (dict(retinanet(), model="RetinaNet"), TypeError, "rules"),
            (dict(model="RetinaNet", rules=dict(RULE)), TypeError, "rules must be a list of dicts"),
            (
                dict(model=retinanet(), rules=[RULE, dict(select="backbone")]),
                TypeError,
                r"rules\[1\] must be dict\(select=..., type=..., arguments\), got {'select'",
            ),
            (
                dict(model=retinanet(), rules=[dict(RULE, type="mmdeform.NoSuchLayer")]),
                KeyError,
                r"rules\[0\]: type 'mmdeform.NoSuchLayer' is in no registry",
            ),
            (
                dict(model=retinanet(), rules=[dict(select="neck", type=dict)]),
                TypeError,
                "must make a torch.nn.Module",
            ),
            (dict(model="NoSuchDetector", rules=[]), KeyError, "NoSuchDetector"),
        ],
    )
    def test_errors(self, cfg: dict, error: type[Exception], message: str) -> None:
        init_default_scope("mmdet")
        cfg = dict(cfg, type="mmdeform.Transplant")
        if "model" in cfg and isinstance(cfg["model"], str) and "backbone" not in cfg:
            cfg = {**retinanet(), **cfg}
        with pytest.raises(error, match=message):
            MODELS.build(cfg)

    def test_replacements_are_logged(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lines = []
        monkeypatch.setattr(
            "mmdeform.models.transplant.transplant.print_log", lambda text, **_: lines.append(text)
        )
        build(retinanet(), RULE)
        rows = lines[0].splitlines()
        assert rows[0] == "Transplant replaced 4 modules:" and len(rows) == 6
        assert rows[2].split() == [
            "backbone.layer3.0.conv2",
            "Conv2d",
            "ModulatedDeformConv2dPack",
            "weight",
            "conv_offset.weight,",
            "conv_offset.bias",
        ]


class TestConfigs:
    BASE = "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"

    def write(self, path: Path, model: str, base: str = BASE) -> Path:
        path.write_text(
            f"_base_ = {base!r}\n"
            "custom_imports = dict(imports=['mmdeform'], allow_failed_imports=False)\n"
            f"model = {model}\n"
        )
        return path

    def flat(self, folder: Path) -> Path:
        model = f"dict(type='mmdeform.Transplant', model='RetinaNet', rules=[{RULE}])"
        return self.write(folder / "flat.py", model)

    def whole(self, folder: Path, delete: str = "_delete_=True, ") -> Path:
        model = "model={{_base_.model}}"
        model = f"dict({delete}type='mmdeform.Transplant', {model}, rules=[{RULE}])"
        return self.write(folder / "whole.py", model)

    @pytest.mark.parametrize("spelling", ["flat", "whole"])
    def test_over_a_config_of_mmdet(self, spelling: str, tmp_path: Path) -> None:
        cfg = Config.fromfile(getattr(self, spelling)(tmp_path))
        assert Config.fromstring(cfg.pretty_text, ".py").to_dict() == cfg.to_dict()
        cfg.merge_from_dict({"model.rules.0.deform_groups": 4})
        init_default_scope("mmdet")
        with torch.device("meta"):
            detector = MODELS.build(cfg.model)
        assert detector.backbone.layer4[0].conv2.deform_groups == 4

    def test_base_without_delete_is_explained(self, tmp_path: Path) -> None:
        cfg = Config.fromfile(self.whole(tmp_path, delete=""))
        init_default_scope("mmdet")
        with pytest.raises(TypeError, match="_delete_=True"):
            MODELS.build(cfg.model)

    def test_children_change_rules_and_wrap(self, tmp_path: Path) -> None:
        self.flat(tmp_path)
        rules = "rules=[dict(select='backbone.layer4.*.conv1', type='mmdeform.DCN')]"
        child = self.write(tmp_path / "child.py", f"dict({rules})", "./flat.py")
        around = self.write(
            tmp_path / "around.py",
            f"dict(_delete_=True, type='mmdeform.Transplant', model={{{{_base_.model}}}}, {rules})",
            "./flat.py",
        )
        init_default_scope("mmdet")
        expected = {child: {layers.DeformConv2dPack}}
        expected[around] = expected[child] | {layers.ModulatedDeformConv2dPack}
        for path, kinds in expected.items():
            with torch.device("meta"):
                detector = MODELS.build(Config.fromfile(path).model)
            deformable = {layers.DeformConv2dPack, layers.ModulatedDeformConv2dPack}
            assert {type(m) for m in detector.modules()} & deformable == kinds

    @pytest.mark.slow
    def test_init_detector_and_test_time_augmentation(self, tmp_path: Path) -> None:
        cfg = Config.fromfile(self.flat(tmp_path))
        detector = init_detector(copy.deepcopy(cfg), device="cpu")
        assert type(detector.backbone.layer4[0].conv2) is layers.ModulatedDeformConv2dPack
        tta = MODELS.build(dict(type="DetTTAModel", module=cfg.model))
        assert type(tta.module.backbone.layer4[0].conv2) is layers.ModulatedDeformConv2dPack

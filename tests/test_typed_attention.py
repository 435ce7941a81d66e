"""Attention classes of mmdet's transformers come from the config."""

import ast
import copy
import inspect
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet")
from mmcv.cnn.bricks.transformer import MultiheadAttention
from mmcv.ops import MultiScaleDeformableAttention as MMCVAttention
from mmdet.models.layers import ConditionalAttention, transformer
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from mmengine.utils import get_installed_path

from mmdeform import typed_attention
from mmdeform.layers import MultiScaleDeformableAttention

typed_attention.disable()  # the import enabled it, for all tests
MMDET_CONFIGS = Path(get_installed_path("mmdet"), ".mim", "configs")
LAYERS = import_module("mmdet.models.layers.transformer.deformable_detr_layers")
CREATED = [(module, name) for module, names in typed_attention._CREATED.items() for name in names]


class OtherAttention(MultiheadAttention):
    """Plain attention of a project."""


class OtherConditionalAttention(ConditionalAttention):
    """Conditional attention of a project."""


DEFORMABLE = dict(type="mmdeform.MultiScaleDeformableAttention")
OTHER = dict(type=OtherAttention)
CONDITIONAL = dict(type=OtherConditionalAttention)
# Config in mmdet, then its attention: encoder.self, decoder.self, decoder.cross.
FAMILIES = {
    "detr": ("detr/detr_r50_8xb2-150e_coco", OTHER, OTHER, OTHER),
    "conditional": (
        "conditional_detr/conditional-detr_r50_8xb2-50e_coco",
        OTHER,
        CONDITIONAL,
        CONDITIONAL,
    ),
    "dab": ("dab_detr/dab-detr_r50_8xb2-50e_coco", OTHER, CONDITIONAL, CONDITIONAL),
    "deformable": (
        "deformable_detr/deformable-detr_r50_16xb2-50e_coco",
        DEFORMABLE,
        OTHER,
        DEFORMABLE,
    ),
    "dino": ("dino/dino-4scale_r50_8xb2-12e_coco", DEFORMABLE, OTHER, DEFORMABLE),
    "ddq": ("ddq/ddq-detr-4scale_r50_8xb2-12e_coco", DEFORMABLE, OTHER, DEFORMABLE),
    "mask2former": (
        "mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic",
        DEFORMABLE,
        OTHER,
        OTHER,
    ),
    "grounding_dino": (
        "grounding_dino/grounding_dino_r50_scratch_8xb2_1x_coco",
        DEFORMABLE,
        OTHER,
        DEFORMABLE,
    ),
}


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    init_default_scope("mmdet")
    typed_attention.enable()
    yield
    typed_attention.disable()


def transformer_cfgs(model: ConfigDict) -> tuple[ConfigDict, ConfigDict]:
    """The configs of encoder and decoder."""
    if "panoptic_head" in model:
        head = model.panoptic_head
        return head.pixel_decoder.encoder, head.transformer_decoder
    return model.encoder, model.decoder


def build(model: ConfigDict) -> nn.Module:
    """The detector without weights; of Grounding DINO the layers that need no language model."""
    with torch.device("meta"):
        if model.type != "GroundingDINO":
            return MODELS.build(model)
        model.encoder.num_cp = 0  # activation checkpoints need fairscale
        return nn.ModuleDict(
            dict(
                encoder=transformer.GroundingDinoTransformerEncoder(**model.encoder),
                decoder=transformer.GroundingDinoTransformerDecoder(**model.decoder),
            )
        )


def attention_types(module: nn.Module) -> Counter[type]:
    """The classes of attention and their number."""
    kinds = (MultiheadAttention, ConditionalAttention, MMCVAttention)
    return Counter(type(m) for m in module.modules() if isinstance(m, kinds))


def originals() -> list[type]:
    modules = [import_module(f"{transformer.__name__}.{module}") for module, _ in CREATED]
    return [getattr(module, name) for module, (_, name) in zip(modules, CREATED, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_config_chooses_the_attention(family: str) -> None:
    path, *kinds = FAMILIES[family]
    model = Config.fromfile(MMDET_CONFIGS / f"{path}.py").model
    encoder, decoder = transformer_cfgs(model)
    plain = attention_types(build(copy.deepcopy(model)))
    assert set(plain) <= {MultiheadAttention, ConditionalAttention, MMCVAttention}

    encoder.layer_cfg.self_attn_cfg.update(kinds[0])
    decoder.layer_cfg.self_attn_cfg.update(kinds[1])
    decoder.layer_cfg.cross_attn_cfg.update(kinds[2])
    text_layers = 0
    if family == "grounding_dino":
        decoder.layer_cfg.cross_attn_text_cfg.update(OTHER)
        text_layers = encoder.num_layers  # their config has no type
    replacements = {
        MultiheadAttention: OtherAttention,
        ConditionalAttention: OtherConditionalAttention,
        MMCVAttention: MultiScaleDeformableAttention,
    }
    expected = Counter({replacements[kind]: number for kind, number in plain.items()})
    expected[OtherAttention] -= text_layers
    assert attention_types(build(model)) == expected + Counter({MultiheadAttention: text_layers})


def test_table_has_every_attention_that_mmdet_creates_by_name() -> None:
    names = {"ConditionalAttention", "MultiheadAttention", "MultiScaleDeformableAttention"}
    found = set()
    for info in iter_modules(transformer.__path__):
        module = import_module(f"{transformer.__name__}.{info.name}")
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in names:
                found.add((info.name, node.func.id))
    assert found == set(CREATED)


def test_dino_trains_from_its_own_sampling_grid() -> None:
    cfg = Config.fromfile(MMDET_CONFIGS / "dino/dino-4scale_r50_8xb2-12e_coco.py").model
    cfg.backbone.update(base_channels=8, stem_channels=8, frozen_stages=-1, init_cfg=None)
    cfg.neck.update(in_channels=[64, 128, 256])
    cfg.num_queries, cfg.bbox_head.num_classes, cfg.dn_cfg.group_cfg.num_dn_queries = 20, 3, 4
    cfg.encoder.num_layers = cfg.decoder.num_layers = 1
    cfg.encoder.layer_cfg.self_attn_cfg.update(DEFORMABLE, num_points=2)
    cfg.decoder.layer_cfg.cross_attn_cfg.update(DEFORMABLE, num_points=3)
    detector = MODELS.build(cfg)
    detector.init_weights()
    attention = [m for m in detector.modules() if isinstance(m, MMCVAttention)]
    assert [type(m) for m in attention] == [MultiScaleDeformableAttention] * 2
    assert [m.num_points for m in attention] == [2, 3]
    for module in attention:
        fresh = MultiScaleDeformableAttention(num_points=module.num_points)
        torch.testing.assert_close(module.sampling_offsets.bias, fresh.sampling_offsets.bias)
        assert not module.sampling_offsets.weight.any()

    sample = DetDataSample(metainfo=dict(batch_input_shape=(64, 64), img_shape=(64, 64)))
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[8.0, 8.0, 40.0, 32.0]]), labels=torch.tensor([1])
    )
    losses = detector(torch.randn(1, 3, 64, 64), [sample], mode="loss")
    total, _ = detector.parse_losses(losses)
    total.backward()
    assert total.isfinite()
    assert all(m.sampling_offsets.weight.grad.abs().sum() > 0 for m in attention)


def test_own_detector_keeps_its_types() -> None:
    """mmdeform.DeformableDETR takes its types out before mmdet's layers see them."""
    path = Path(__file__).parents[1] / "configs/deformable_detr/deformable-detr_r50_shapes.py"
    cfg = Config.fromfile(path).model
    cfg.encoder.layer_cfg.self_attn_cfg.type = "MultiScaleDeformableAttention"
    cfg.decoder.layer_cfg.self_attn_cfg.type = OtherAttention  # by typed_attention
    detector = MODELS.build(cfg)
    assert attention_types(detector.encoder) == {MMCVAttention: 3}
    assert attention_types(detector.decoder) == {
        OtherAttention: 3,
        MultiScaleDeformableAttention: 3,
    }


@pytest.mark.parametrize("name", ["mmdeform.NoSuchAttention", "NoSuchAttention"])
def test_unknown_type_is_named(name: str) -> None:
    with pytest.raises(KeyError, match=f"{name} is not in"):
        LAYERS.MultiScaleDeformableAttention(type=name)


def test_argument_that_the_type_does_not_take_is_named() -> None:
    with pytest.raises(TypeError, match=r"Conv2d.*'num_points'"):
        LAYERS.MultiScaleDeformableAttention(type="Conv2d", num_points=4)


def test_without_type_the_original_is_built() -> None:
    for kwargs in (dict(), dict(type=None)):
        assert type(LAYERS.MultiScaleDeformableAttention(32, 4, **kwargs)) is MMCVAttention


def test_name_still_works_as_a_class() -> None:
    name = LAYERS.MultiScaleDeformableAttention
    for module in (MMCVAttention(32, 4), MultiScaleDeformableAttention(32, 4)):
        assert isinstance(module, name) and issubclass(type(module), name)
    assert not isinstance(nn.Conv2d(1, 1, 1), name) and not issubclass(nn.Conv2d, MMCVAttention)
    assert name.__module__ == MMCVAttention.__module__ and str(name) == str(MMCVAttention)

    subclass = type("Subclass", (name,), {})
    module = subclass(32, 4)
    assert type(module) is subclass and isinstance(module, MMCVAttention)
    assert not isinstance(MMCVAttention(32, 4), subclass)
    assert type(copy.deepcopy(module)) is subclass
    built = name(type="mmdeform.MultiScaleDeformableAttention", embed_dims=32, num_heads=4)
    assert type(pickle.loads(pickle.dumps(built))) is MultiScaleDeformableAttention


def test_enable_and_disable_any_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = originals()
    typed_attention.enable()
    assert originals() == typed
    typed_attention.disable()
    plain = originals()
    typed_attention.disable()
    assert originals() == plain and not set(plain) & set(typed)
    with pytest.raises(TypeError, match="'type'"):
        LAYERS.MultiScaleDeformableAttention(type="MultiScaleDeformableAttention")
    typed_attention.enable()
    # What somebody else puts there later stays.
    monkeypatch.setattr(LAYERS, "MultiheadAttention", OtherAttention)
    typed_attention.disable()
    assert LAYERS.MultiheadAttention is OtherAttention


@pytest.mark.slow
@pytest.mark.parametrize("first", ["", "mmdet.models"])
def test_custom_import_is_enough_in_any_order(first: str, tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text(
        "_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'\n"
        "custom_imports = dict(imports=['mmdeform.typed_attention'], allow_failed_imports=False)\n"
        "kind = 'mmdeform.MultiScaleDeformableAttention'\n"
        "model = dict(decoder=dict(layer_cfg=dict(cross_attn_cfg=dict(type=kind))))\n"
    )
    code = f"""
{f"import {first}" if first else ""}
import sys
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
cfg = Config.fromfile(sys.argv[1])
init_default_scope(cfg.default_scope)
with torch.device("meta"):
    detector = MODELS.build(cfg.model)
kinds = [type(layer.cross_attn).__module__ for layer in detector.decoder.layers]
assert kinds == ["mmdeform.layers.ms_deform_attn"] * 6, kinds
assert type(detector.encoder.layers[0].self_attn).__module__.startswith("mmcv")
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(config)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr

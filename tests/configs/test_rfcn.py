"""The configs of R-FCN and of the class-aware RPN: published settings, parameters, ablations."""

import copy
import functools
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet")
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from torch import nn

from mmdeform.layers import DeformConv2dPack, DeformPSRoIPool, DeformPSRoIPoolPack

FOLDER = Path(__file__).parents[2] / "configs" / "rfcn"
ABLATIONS = sorted((FOLDER / "ablations").glob("*.py"))
RFCN = sorted(path.stem for path in FOLDER.glob("rfcn_*[!s].py"))
CLASS_AWARE = sorted(path.stem for path in FOLDER.glob("class-aware-rpn_*[!s].py"))
DCN = dict(type="mmdeform.DCN", deform_groups=4, fallback_on_stride=False)
PARAMETERS = {  # with R101, for the 20 classes of VOC
    "rfcn_r101_voc0712": 50_596_150,
    "rfcn_r101-dconv-c5_voc0712": 51_591_694,
    "rfcn_r101-dconv-c5-dpspool_voc0712": 53_801_594,
}


def load(name: str) -> Config:
    return Config.fromfile(FOLDER / f"{name}.py")


def build(cfg: Config) -> nn.Module:
    init_default_scope("mmdet")
    with torch.device("meta"):
        return MODELS.build(copy.deepcopy(cfg.model))


@functools.cache
def built(name: str) -> tuple[Config, nn.Module]:
    cfg = load(name)
    return cfg, build(cfg)


def convolutions(model: nn.Module) -> dict[str, DeformConv2dPack]:
    return {n: m for n, m in model.named_modules() if isinstance(m, DeformConv2dPack)}


def test_there_are_all_combinations() -> None:
    modules = ("", "-dconv-c5", "-dpspool", "-dconv-c5-dpspool")
    expected = {
        f"rfcn_{net}{suffix}_{data}"
        for net in ("r50", "r101")
        for suffix in modules
        for data in ("voc0712", "coco")
    }
    assert set(RFCN) == expected
    assert len(CLASS_AWARE) == 4


@pytest.mark.parametrize("name", RFCN)
def test_settings_are_the_authors(name: str) -> None:
    cfg, model = built(name)
    on_voc = name.endswith("voc0712")
    head = model.roi_head.bbox_head
    assert head.num_classes == (20 if on_voc else 80)
    assert head.reg_class_agnostic and head.ohem == 128
    assert head.bbox_coder.stds == [0.1, 0.1, 0.2, 0.2]
    for branch in (head.fc_cls, head.fc_reg):
        pool = branch.pool
        assert type(pool) is (DeformPSRoIPoolPack if "dpspool" in name else DeformPSRoIPool)
        assert pool.output_size == (7, 7) and pool.group_size == pool.part_size == 7
        assert (pool.spatial_scale, pool.sample_per_part, pool.trans_std) == (1 / 16, 4, 0.1)
    assert head.fc_cls.conv.out_channels == 49 * (head.num_classes + 1)
    assert head.fc_reg.conv.out_channels == 49 * 4
    if "dpspool" in name:
        assert head.fc_cls.pool.num_classes == head.num_classes + 1

    rpn = model.rpn_head
    assert (rpn.in_indices, rpn.rpn_conv.in_channels, rpn.feat_channels) == ((0,), 1024, 512)
    scales = [8, 16, 32] if on_voc else [4, 8, 16, 32]
    assert rpn.prior_generator.scales.tolist() == scales
    assert rpn.num_base_priors == 3 * len(scales)
    assert (cfg.model.train_cfg.rpn.sampler.num, cfg.model.train_cfg.rpn.allowed_border) == (256, 0)
    for proposals in (cfg.model.train_cfg.rpn_proposal, cfg.model.test_cfg.rpn):
        assert (proposals.nms_pre, proposals.max_per_img) == (6000, 300)
        assert proposals.nms.iou_threshold == 0.7
    assert cfg.model.test_cfg.rcnn.nms.iou_threshold == 0.3
    check_backbone_and_schedule(cfg, model, name)


@pytest.mark.parametrize("name", CLASS_AWARE)
def test_class_aware_rpn_is_trained_like_it(name: str) -> None:
    cfg, model = built(name)
    head = model.bbox_head
    assert head.prior_generator.num_base_priors == [9]
    assert head.rpn_conv.in_channels == 1024
    assert head.rpn_cls.out_channels == 9 * 21 and head.rpn_reg.out_channels == 9 * 4
    assert cfg.model.train_cfg.sampler.num == 256
    assert cfg.model.test_cfg.nms.iou_threshold == 0.3
    check_backbone_and_schedule(cfg, model, name)
    twin = load(name.replace("class-aware-rpn", "rfcn")).to_dict()
    ours = cfg.to_dict()
    for key in ("backbone", "neck", "data_preprocessor"):
        theirs = dict(twin["model"][key])
        if key == "backbone":
            theirs["out_indices"] = ours["model"][key]["out_indices"]
        assert ours["model"][key] == theirs
    ours.pop("model"), twin.pop("model")
    assert ours == twin


def check_backbone_and_schedule(cfg: Config, model: nn.Module, name: str) -> None:
    depth = 101 if "r101" in name else 50
    assert len(model.backbone.layer3) == (23 if depth == 101 else 6)
    checkpoint = f"open-mmlab://detectron2/resnet{depth}_caffe"
    assert cfg.model.backbone.init_cfg.checkpoint == checkpoint
    for index, block in enumerate(model.backbone.layer4):
        assert block.conv2.dilation == block.conv2.padding == (2, 2), index
        assert block.conv1.stride == block.conv2.stride == (1, 1), index
    deformable = convolutions(model)
    expected = [f"backbone.layer4.{i}.conv2" for i in range(3)] if "dconv" in name else []
    assert list(deformable) == expected
    assert all(layer.deform_groups == 4 for layer in deformable.values())

    on_voc = name.endswith("voc0712")
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    rates = {id(p): g["lr"] for g in wrapper.optimizer.param_groups for p in g["params"]}
    images = cfg.auto_scale_lr.base_batch_size
    assert images == 4
    for parameter_name, parameter in model.named_parameters():
        frozen = re.match(r"backbone\.(conv1|layer1)|.*\bbn\d|.*downsample\.1", parameter_name)
        assert parameter.requires_grad == (not frozen), parameter_name
        if parameter.requires_grad:
            multiplier = 3 if parameter_name.startswith("neck.") else 1
            expected_rate = pytest.approx(0.0005 * images * multiplier)
            assert rates[id(parameter)] == expected_rate, parameter_name
    (defaults,) = [wrapper.optimizer.defaults]
    assert (defaults["momentum"], defaults["weight_decay"]) == (0.9, 0.0005)
    warmup, steps = cfg.param_scheduler
    assert (warmup.factor, warmup.end, warmup.by_epoch) == (0.1, 1000, False)
    assert (cfg.train_cfg.max_epochs, steps.milestones) == ((14, [10]) if on_voc else (16, [11]))
    assert cfg.train_dataloader.batch_size == 1
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        sets = [loader.dataset]
        while "dataset" in sets[0]:
            sets = [sets[0].dataset]
        for dataset in sets[0].get("datasets", sets):
            (resize,) = [step for step in dataset.pipeline if step.type == "Resize"]
            assert tuple(resize.scale) == (1000, 600) and resize.keep_ratio
    if on_voc:
        assert cfg.train_dataloader.dataset.times == 1
        assert cfg.val_evaluator.iou_thrs == cfg.test_evaluator.iou_thrs == [0.5, 0.7]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    """The paper has 47.1 M without deformable modules and 49.5 M with both."""
    _, model = built(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
@pytest.mark.parametrize("base", ["rfcn_r101_voc0712", "class-aware-rpn_r101_voc0712"])
def test_ablations_change_what_their_names_say_and_nothing_else(
    base: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RFCN_BASE", base)
    cfg = Config.fromfile(path)
    model = build(cfg)
    plain_cfg, plain = built(base)
    assert type(model) is type(plain)
    kind, number = path.stem.split("-")
    dilation = int(number) if kind == "dilation" else 2
    for block in model.backbone.layer4:
        assert block.conv2.dilation == block.conv2.padding == (dilation, dilation)
    blocks = [f"layer3.{i}" for i in range(23)] + [f"layer4.{i}" for i in range(3)]
    last = blocks[-int(number) :] if kind == "dconv" else []
    deformable = convolutions(model)
    assert list(deformable) == [f"backbone.{block}.conv2" for block in last]
    assert all(layer.deform_groups == 4 for layer in deformable.values())
    added = {n for n, _ in model.named_parameters()} - {n for n, _ in plain.named_parameters()}
    assert all("conv_offset" in name for name in added) and len(added) == 2 * len(last)
    ours, theirs = cfg.to_dict(), plain_cfg.to_dict()
    if kind == "dconv":
        ours["model"].pop("rules")
        ours["model"]["type"] = ours["model"].pop("model")
    else:
        ours["model"]["backbone"]["dilations"] = theirs["model"]["backbone"]["dilations"]
    assert ours == theirs


def test_rule_and_option_make_the_same_detector() -> None:
    """The three layers of c5, by name or by ResNet's own option."""
    by_rule = build(Config.fromfile(FOLDER / "ablations" / "dconv-3.py"))
    _, by_option = built("rfcn_r101-dconv-c5_voc0712")
    assert {n: p.shape for n, p in by_rule.named_parameters()} == {
        n: p.shape for n, p in by_option.named_parameters()
    }


def test_ablations_are_documented() -> None:
    readme = (FOLDER / "ablations" / "README.md").read_text()
    assert set(re.findall(r"\]\(\./(.+)\.py\)", readme)) == {path.stem for path in ABLATIONS}


@pytest.mark.parametrize("name", ["rfcn_r50-dpspool_shapes", "rfcn_r50-dconv-c5-dpspool_shapes"])
def test_small_twins_differ_in_their_operators_only(name: str) -> None:
    ours, theirs = load(name).to_dict(), load("rfcn_r50_shapes").to_dict()
    pool = ours["model"]["roi_head"]["bbox_head"]["roi_layer"]
    assert (pool.pop("type"), pool.pop("trans_std")) == ("mmdeform.DeformPSRoIPoolPack", 0.1)
    assert theirs["model"]["roi_head"]["bbox_head"]["roi_layer"].pop("type")
    if "dconv" in name:
        assert ours["model"]["backbone"].pop("dcn") == DCN
        assert ours["model"]["backbone"].pop("stage_with_dcn") == (False, False, False, True)
    assert ours == theirs


def test_small_class_aware_rpn_shares_its_backbone() -> None:
    ours, theirs = load("class-aware-rpn_r50_shapes"), load("rfcn_r50_shapes")
    backbone = dict(theirs.model.backbone, out_indices=(3,))
    assert ours.model.backbone.to_dict() == Config(backbone).to_dict()
    ours.pop("model"), theirs.pop("model")
    assert ours.to_dict() == theirs.to_dict()

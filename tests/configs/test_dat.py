"""The configs of DAT: published settings, ablations that run over any base, classifiers."""

import copy
import functools
import importlib.util
import re
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet")
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope

from mmdeform.layers import DeformableAttention2d
from mmdeform.models import DAT

FOLDER = Path(__file__).parents[2] / "configs" / "dat"
ABLATIONS = sorted((FOLDER / "ablations").glob("*.py"))
CLASSIFIERS = sorted((FOLDER / "classification").glob("*.py"))
SIZES = {"t": "tiny", "s": "small", "b": "base"}
DIMS = {"t-v1": 96, "s-v1": 96, "b-v1": 128, "t-pp": 64, "s-pp": 96, "b-pp": 128}
PARAMETERS = {  # of the classifiers
    "t-v1": 28_319_138,
    "s-v1": 49_700_402,
    "b-v1": 87_881_632,
    "t-pp": 23_962_876,
    "s-pp": 53_127_366,
    "b-pp": 93_690_640,
}
DEFORMABLE_BLOCKS = {"t-v1": 4, "s-v1": 10, "b-v1": 10, "t-pp": 14, "s-pp": 14, "b-pp": 14}
DROP_PATH = {
    "retinanet": {"1x": dict(t=0.0, s=0.1, b=0.2), "3x": dict(t=0.2, s=0.5, b=0.8)},
    "mask-rcnn": {"1x": dict(t=0.0, s=0.1, b=0.2), "3x": dict(t=0.3, s=0.5, b=0.8)},
    "cascade-mask-rcnn": {"1x": dict(t=0.0, s=0.1, b=0.2), "3x": dict(t=0.1, s=0.5, b=0.8)},
}
COCO = [
    f"{detector}_dat-{backbone}_fpn_ms-crop-{schedule}_coco"
    for detector in DROP_PATH
    for schedule in ("1x", "3x")
    for backbone in DIMS
]


def parts(name: str) -> tuple[str, str, str]:
    """Detector, backbone and schedule in the name of a config: 'mask-rcnn', 't-v1', '1x'."""
    detector, backbone, _, schedule, _ = name.split("_")
    return detector, backbone.removeprefix("dat-"), schedule.removeprefix("ms-crop-")


@functools.cache
def config(name: str) -> Config:
    return Config.fromfile(FOLDER / f"{name}.py")


def build_on_meta(model: dict) -> nn.Module:
    """A model without memory for the weights."""
    linspace = functools.partial(torch.linspace, device="cpu")  # drop path reads its values
    with torch.device("meta"), patch.object(torch, "linspace", linspace):
        return MODELS.build(copy.deepcopy(model))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def deformable_blocks(model: nn.Module) -> int:
    return sum(isinstance(module, DeformableAttention2d) for module in model.modules())


@pytest.fixture(autouse=True)
def mmdet_scope() -> None:
    init_default_scope("mmdet")


def test_there_is_a_config_for_every_detector_backbone_and_schedule() -> None:
    assert {path.stem for path in FOLDER.glob("*_coco.py")} == set(COCO)
    assert len(COCO) == 36


@pytest.mark.parametrize("name", COCO)
def test_detectors_have_the_published_settings(name: str) -> None:
    cfg, (detector, backbone, schedule) = config(name), parts(name)
    size, version = backbone.split("-")
    assert (cfg.model.backbone.arch, cfg.model.backbone.version) == (SIZES[size], version)
    assert cfg.model.backbone.drop_path_rate == DROP_PATH[detector][schedule][size]
    dims = [DIMS[backbone] * 2**stage for stage in range(4)]
    assert cfg.model.neck.in_channels == (dims[1:] if detector == "retinanet" else dims)
    assert cfg.model.data_preprocessor.pad_size_divisor == 32

    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.weight_decay, optimizer.betas) == (
        "AdamW",
        0.05,
        (0.9, 0.999),
    )
    assert optimizer.lr == (2e-4 if detector == "retinanet" else 4e-4)
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=64)
    epochs, steps = (12, [8, 11]) if schedule == "1x" else (36, [27, 33])
    warmup, drops = cfg.param_scheduler
    assert cfg.train_cfg.max_epochs == drops.end == epochs
    assert drops.milestones == steps and drops.gamma == 0.1
    assert (warmup.start_factor, warmup.by_epoch, warmup.end) == (0.001, False, 500)

    load, annotations, flip, choice, pack = cfg.train_dataloader.dataset.pipeline
    assert [load.type, flip.type, pack.type] == ["LoadImageFromFile", "RandomFlip", "PackDetInputs"]
    assert annotations.get("with_mask", False) == (detector != "retinanet")
    sizes = [(short, 1333) for short in (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)]
    (whole,), (before, crop, after) = choice.transforms
    assert whole.scales == after.scales == sizes
    assert before.scales == [(400, 1333), (500, 1333), (600, 1333)]
    assert (crop.crop_type, crop.crop_size) == ("absolute_range", (384, 600))

    assert cfg.custom_imports == dict(imports=["mmdeform"], allow_failed_imports=False)
    assert cfg.default_scope == "mmdet"


@pytest.mark.parametrize("name", [name for name in COCO if "1x" in name])
def test_detectors_build(name: str) -> None:
    detector, backbone, _ = parts(name)
    model = build_on_meta(config(name).model)
    assert isinstance(model.backbone, DAT)
    assert deformable_blocks(model) == DEFORMABLE_BLOCKS[backbone]
    # A classifier has a norm and a linear layer at its end, a detector norms of its stages.
    dims = [DIMS[backbone] * 2**stage for stage in range(4)]
    used = dims[1:] if detector == "retinanet" else dims
    classifier = PARAMETERS[backbone] - 2 * dims[3] - 1000 * (dims[3] + 1)
    assert count(model.backbone) == classifier + 2 * sum(used)
    convolution_on_top = detector != "cascade-mask-rcnn"
    assert len(model.neck.fpn_convs) == (5 if convolution_on_top else 4)

    longer = copy.deepcopy(config(name.replace("1x", "3x")).model)
    longer.backbone.drop_path_rate = config(name).model.backbone.drop_path_rate
    assert longer == config(name).model


def test_a_parsed_config_can_be_written_and_read() -> None:
    cfg = config("cascade-mask-rcnn_dat-b-pp_fpn_ms-crop-3x_coco")
    assert Config.fromstring(cfg.pretty_text, ".py").to_dict() == cfg.to_dict()


def test_box_heads_of_the_cascade_are_those_of_the_authors() -> None:
    model = build_on_meta(config("cascade-mask-rcnn_dat-t-v1_fpn_ms-crop-1x_coco").model)
    assert len(model.roi_head.bbox_head) == 3
    for head, std in zip(model.roi_head.bbox_head, (0.1, 0.05, 0.033), strict=True):
        assert (len(head.shared_convs), len(head.shared_fcs)) == (4, 1)
        assert isinstance(head.shared_convs[0].norm, nn.SyncBatchNorm)
        assert (type(head.loss_bbox).__name__, head.loss_bbox.loss_weight) == ("GIoULoss", 10)
        assert head.reg_decoded_bbox and not head.reg_class_agnostic
        assert head.bbox_coder.stds[0] == std


def decays(model: nn.Module, optim_wrapper: dict) -> dict[str, float]:
    """Weight decay by parameter."""
    groups = build_optim_wrapper(model, optim_wrapper).optimizer.param_groups
    by_id = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    return {name: by_id[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("backbone", ["t-v1", "t-pp"])
def test_norms_and_tables_of_detectors_do_not_decay(backbone: str) -> None:
    cfg = config(f"mask-rcnn_dat-{backbone}_fpn_ms-crop-1x_coco")
    model = build_on_meta(cfg.model)
    spared = re.compile(r"norm|relative_position_bias_table|rpe_table|rpb")
    norms = {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for leaf in ("weight", "bias")
    }
    expected = {
        name: 0.0 if name in norms or spared.search(name) else 0.05
        for name, _ in model.named_parameters()
    }
    assert decays(model, cfg.optim_wrapper) == expected
    tables = ("rpe_table", "relative_position_bias_table" if backbone == "t-v1" else "rpb")
    for table in tables:
        assert any(name.endswith(table) for name in expected)


@pytest.mark.parametrize("path", CLASSIFIERS, ids=lambda path: path.stem)
def test_classifiers_have_the_published_settings(path: Path) -> None:
    cfg = Config.fromfile(path, import_custom_modules=False)
    size, version, batch = re.fullmatch(r"dat-(.)-(..)_(\d+xb\d+)_in1k", path.stem).groups()
    backbone = f"{size}-{version}"
    gpus, images = map(int, batch.split("xb"))
    assert gpus * images == cfg.auto_scale_lr.base_batch_size == 1024
    assert cfg.train_dataloader.batch_size == images
    assert cfg.custom_imports.imports == ["mmpretrain", "mmdeform"]
    assert cfg.default_scope == "mmpretrain"

    gentle = backbone == "b-v1"
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.weight_decay, optimizer.betas) == (
        "AdamW",
        0.05,
        (0.9, 0.999),
    )
    assert optimizer.lr == pytest.approx((4e-4 if gentle else 5e-4) * 1024 / 512)
    assert cfg.optim_wrapper.clip_grad.max_norm == (1.0 if gentle else 5.0)
    assert cfg.train_cfg.max_epochs == 300
    warmup, cosine = cfg.param_scheduler
    assert warmup.end == cosine.begin == (50 if gentle else 20) and cosine.end == 300
    assert warmup.start_factor * optimizer.lr == pytest.approx(5e-7 * 2)
    assert cosine.eta_min == pytest.approx(5e-6 * 2)

    augments = {augment.type: augment.alpha for augment in cfg.model.train_cfg.augments}
    assert augments == {"Mixup": 0.8, "CutMix": 1.0}
    assert cfg.model.head.loss.label_smooth_val == 0.1
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    randaugment = steps["RandAugment"]
    assert (randaugment.policies, randaugment.num_policies) == ("timm_increasing", 2)
    assert (randaugment.magnitude_level, randaugment.magnitude_std) == (9, 0.5)
    assert steps["RandomErasing"].erase_prob == 0.25
    resize, crop = cfg.test_dataloader.dataset.pipeline[1:3]
    assert (resize.scale, crop.crop_size) == ((256, 256), 224)

    assert cfg.model.backbone.arch == SIZES[size] and cfg.model.backbone.version == version
    model = build_on_meta(cfg.model.backbone)
    assert cfg.model.head.in_channels == DIMS[backbone] * 8
    assert count(model) + 1000 * (cfg.model.head.in_channels + 1) == PARAMETERS[backbone]
    rates = [rate for rate in (getattr(m, "drop_prob", None) for m in model.modules()) if rate]
    published = {"t-v1": 0.2, "s-v1": 0.3, "b-v1": 0.5, "t-pp": 0.2, "s-pp": 0.4, "b-pp": 0.7}
    assert max(rates) == pytest.approx(published[backbone])


def test_vectors_and_tables_of_classifiers_do_not_decay() -> None:
    path = FOLDER / "classification" / "dat-t-v1_8xb128_in1k.py"
    cfg = Config.fromfile(path, import_custom_modules=False)
    cfg.optim_wrapper.type = "OptimWrapper"  # that of mixed precision asks for a GPU
    model = build_on_meta(cfg.model.backbone)
    found = decays(model, cfg.optim_wrapper)
    for name, parameter in model.named_parameters():
        spared = parameter.ndim == 1 or name.endswith(("bias", "table"))
        assert found[name] == (0.0 if spared else 0.05), name


@pytest.mark.skipif(importlib.util.find_spec("mmpretrain") is None, reason="needs mmpretrain")
@pytest.mark.parametrize("path", CLASSIFIERS, ids=lambda path: path.stem)
def test_classifiers_build_with_mmpretrain(path: Path) -> None:
    from mmpretrain.registry import MODELS as CLASSIFIER_MODELS
    from mmpretrain.registry import TRANSFORMS

    cfg = Config.fromfile(path)
    init_default_scope("mmpretrain")
    for step in (*cfg.train_pipeline, *cfg.test_pipeline):
        TRANSFORMS.build(step)
    model = CLASSIFIER_MODELS.build({**cfg.model, "data_preprocessor": cfg.data_preprocessor})
    assert count(model) == PARAMETERS["-".join(path.stem.split("_")[0].split("-")[1:])]
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 1000)


def rows() -> dict[str, str]:
    """Rows of the tables of ablations, by the file they link."""
    text = (FOLDER / "ablations" / "README.md").read_text()
    return {
        match[1]: match[0] for match in re.finditer(r"^\| \[.*\]\(\./(.+)\.py\).*$", text, re.M)
    }


def test_every_ablation_is_in_a_table() -> None:
    assert set(rows()) == {path.stem for path in ABLATIONS}


def check_name(name: str, stages: list[DeformableAttention2d | None]) -> None:
    """The words of a name say what the layers, one of each stage or None, are like."""
    layers = [layer for layer in stages if layer is not None]
    words = dict(re.findall(r"(stages|groups|range|strides?|offsets|bias)-([\w-]+?)(?:_|$)", name))
    numbers = {word: [int(n) for n in re.findall(r"\d+", value)] for word, value in words.items()}
    if "stages" in words:
        first = numbers["stages"][0] if numbers["stages"] else 5
        assert [layer is not None for layer in stages] == [i >= first for i in range(1, 5)]
    if "groups" in words:
        groups = [layer.num_groups for layer in layers]
        assert groups[-len(numbers["groups"]) :] == numbers["groups"]
    for word in {"stride", "strides"} & set(words):
        assert [layer.stride[0] for layer in layers][-len(numbers[word]) :] == numbers[word]
    for layer in layers:
        assert layer.version == ("pp" if name.startswith("pp") else "v1")
        assert layer.use_offsets == (words.get("offsets", "on") == "on")
        bias = words.get("bias", "relative")
        assert layer.position_bias == (None if bias == "none" else bias)
        usual = -1 if layer.version == "pp" else 2
        factor = (numbers["range"] or [0])[0] if "range" in words else usual
        assert layer.offset_range_factor == factor


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_ablations_change_what_their_names_say_and_nothing_else(path: Path) -> None:
    cfg = Config.fromfile(path).to_dict()
    base = config("mask-rcnn_dat-t-v1_fpn_ms-crop-1x_coco").to_dict()
    backbone = cfg["model"].pop("backbone")
    base["model"].pop("backbone")
    assert cfg == base
    del backbone["drop_path_rate"]
    model = build_on_meta(dict(backbone, num_classes=1000))
    assert f" {count(model) / 1e6:.2f} M |" in rows()[path.stem]
    layers = [
        next((m for m in stage.modules() if isinstance(m, DeformableAttention2d)), None)
        for stage in model.stages
    ]
    check_name(path.stem, layers)


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_ablations_run_over_the_base_that_is_asked_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAT_BASE", "mask-rcnn_dat-t-v1_shapes")
    cfg = Config.fromfile(path)
    assert cfg.train_dataloader.dataset.data_root == "data/shapes/"
    model = MODELS.build(cfg.model.backbone)
    outputs = model(torch.rand(1, 3, 96, 64))
    dims = cfg.model.neck.in_channels
    assert [tuple(output.shape) for output in outputs] == [
        (1, dim, 24 >> stage, 16 >> stage) for stage, dim in enumerate(dims)
    ]
    assert all(output.isfinite().all() for output in outputs)

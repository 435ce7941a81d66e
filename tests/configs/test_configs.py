"""Every shipped config builds; every small one trains; tables and metafiles name what is there."""

import copy
import functools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("mmdet")
import yaml
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.utils import get_installed_path

from mmdeform import typed_attention
from mmdeform.layers import (
    DCNv3,
    DCNv4,
    DeformableAttention2d,
    DeformConv2dPack,
    DeformPSRoIPoolPack,
    DeformRoIPool,
    DeformRoIPoolPack,
    ModulatedDeformConv2dPack,
    ModulatedDeformRoIPoolPack,
    MultiScaleDeformableAttention,
    OffsetConv2d,
    OffsetLinear,
    SingleLevelDeformableAttention,
)

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("[!_]*/*.py"))
SMALL = [path for path in CONFIGS if path.stem.endswith("_shapes")]
# Those of backbones on COCO are many and alike: tests of their own build a selection.
BACKBONES = ("dat", "internimage", "flash_internimage")
BUILT = [path for path in CONFIGS if path.parent.name not in BACKBONES or path in SMALL]
FAMILIES = sorted(path.parent for path in (ROOT / "configs").glob("*/metafile.yml"))
MMDET_CONFIGS = Path(get_installed_path("mmdet"), ".mim", "configs")
COUNTERPARTS = sorted(
    path
    for name in ("dcn", "dcnv2", "deformable_detr", "dino")
    for path in MMDET_CONFIGS.glob(f"{name}/*.py")
)
TRANSFORMERS = [path for path in CONFIGS if path.parent.name in ("deformable_detr", "detr", "dino")]
WITHOUT_PYRAMID = [p for p in CONFIGS if "_dc5_" in p.stem and p not in SMALL]
PAPER = [p for p in TRANSFORMERS if p.stem.startswith("deformable") and p.stem.endswith("_coco")]
# Millions of parameters of each config in the table of models.
PARAMETERS = dict(
    re.findall(
        r"\]\(\.\./(configs/\S+)\) \| [^|]+ \| [^|]+ \| ([\d.]+|-) \|",
        (ROOT / "docs" / "models.md").read_text(),
    )
)
# Residual blocks of c2 to c5, each with one deformable convolution.
BLOCKS = {"r18": (2, 2, 2, 2), "r50": (3, 4, 6, 3), "r101": (3, 4, 23, 3), "x101": (3, 4, 23, 3)}
# The class that a word in a config's name promises.
LAYERS = {
    "dconv": DeformConv2dPack,
    "mdconv": ModulatedDeformConv2dPack,
    "dpool": DeformRoIPoolPack,
    "mdpool": ModulatedDeformRoIPoolPack,
    "dpspool": DeformPSRoIPoolPack,
    "dcnv3": DCNv3,
    "dcnv4": DCNv4,
    "dat": DeformableAttention2d,
    "internimage": DCNv3,
    "flash": DCNv4,
    "deformable": MultiScaleDeformableAttention,
    "dino": MultiScaleDeformableAttention,
}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@functools.cache
def built_on_meta(path: Path) -> tuple[Config, torch.nn.Module]:
    """A config and its model, without memory for the weights."""
    cfg = Config.fromfile(path)
    init_default_scope("mmdet")
    # Swin reads the values of its linspace.
    linspace = functools.partial(torch.linspace, device="cpu")
    with torch.device("meta"), patch.object(torch, "linspace", linspace):
        return cfg, MODELS.build(copy.deepcopy(cfg.model))


def expected_layers(path: Path, model: ConfigDict) -> dict[type, int]:
    """The deformable layers that a config's name promises: their class and number."""
    words = re.split("[-_]", path.stem)
    counts: Counter[type] = Counter()
    if "flash" in words:  # it has DCNv4 where InternImage has DCNv3
        words.remove("internimage")
    for word in set(words) & set(LAYERS):
        if word in ("deformable", "dino"):
            separate = "ms-inputs" in path.stem
            encoder = SingleLevelDeformableAttention if separate else LAYERS[word]
            counts[encoder] += model.encoder.num_layers
            counts[LAYERS[word]] += model.decoder.num_layers
        elif word in ("dpool", "mdpool"):
            levels = 1 if "dc5" in words else 4
            counts[LAYERS[word]] = levels * (2 if "mask" in words else 1)
        elif word == "dpspool":
            counts[LAYERS[word]] = 2  # classes and boxes
        elif word == "dat":
            counts[LAYERS[word]] = 6 if "pp" in words else 4
        elif word in ("internimage", "flash"):
            counts[LAYERS[word]] = sum(model.backbone.depths)
        else:
            first = min(stage for stage in ("c3", "c4", "c5") if stage in words)
            (depth,) = set(words) & set(BLOCKS)
            counts[LAYERS[word]] = sum(BLOCKS[depth][int(first[1]) - 2 :])
    return counts


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module, tuple(LAYERS.values()))]


def offset_layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that predict where to sample and how to weigh it."""
    layers = layers_of(model)
    if isinstance(layers[0], DeformRoIPool):
        layers = layers[:1]  # objects are too small for the coarser levels
    return [
        module
        for layer in layers
        for name, module in layer.named_modules()
        if isinstance(module, (OffsetConv2d, OffsetLinear)) or name == "sampling_offsets"
    ]


def without_scope(config: Any) -> Any:
    """A copy without the names of scopes: mmengine notes one wherever it crosses packages."""
    if isinstance(config, dict):
        return {k: without_scope(v) for k, v in config.items() if k != "_scope_"}
    if isinstance(config, (list, tuple)):
        return type(config)(without_scope(item) for item in config)
    return config.removeprefix("mmdeform.") if isinstance(config, str) else config


@pytest.fixture(autouse=True)
def enabled_typed_attention() -> Iterator[None]:
    # A config imports it, but another test may have disabled it since the first import.
    typed_attention.enable()
    yield
    typed_attention.disable()


def test_all_configs_are_found() -> None:
    names = {name_of(path) for path in CONFIGS}
    assert len(names) >= 56
    assert {"dcnv2/mask-rcnn_r50-mdconv-c3-c5_shapes", "dcnv2/mask-rcnn_r50_shapes"} < names


@pytest.mark.parametrize("path", BUILT, ids=name_of)
def test_config_builds(path: Path) -> None:
    cfg, model = built_on_meta(path)
    imports = ["mmdeform", "mmdeform.typed_attention"][: 2 if path.parent.name == "dino" else 1]
    assert cfg.custom_imports == dict(imports=imports, allow_failed_imports=False)
    assert cfg.default_scope == "mmdet"
    assert Config.fromstring(cfg.pretty_text, ".py").to_dict() == cfg.to_dict()
    assert Counter(map(type, layers_of(model))) == expected_layers(path, cfg.model)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert PARAMETERS[path.relative_to(ROOT).as_posix()] == f"{count / 1e6:.1f}"


@pytest.mark.parametrize("path", COUNTERPARTS, ids=name_of)
def test_counterpart_differs_from_mmdets_in_the_operators_only(path: Path) -> None:
    ours = without_scope(Config.fromfile(ROOT / "configs" / path.parent.name / path.name).to_dict())
    assert ours.pop("custom_imports")
    if ours.pop("attention", None):
        for coder, name in (("encoder", "self_attn_cfg"), ("decoder", "cross_attn_cfg")):
            del ours["model"][coder]["layer_cfg"][name]["type"]
    assert ours == without_scope(Config.fromfile(path).to_dict())


@pytest.mark.parametrize("path", SMALL, ids=name_of)
def test_small_config_trains(path: Path, shapes: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    cfg = Config.fromfile(path)
    cfg.work_dir = str(tmp_path)
    cfg.train_dataloader.batch_size = 2
    cfg.train_dataloader.dataset.data_root = str(shapes)
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.test_dataloader = cfg.test_evaluator = cfg.test_cfg = None
    cfg.experiment_name = name_of(path).replace("/", "_")
    runner = Runner.from_cfg(cfg)
    model = runner.model
    model.init_weights()
    model.train()
    offsets = offset_layers_of(model) if expected_layers(path, cfg.model) else []
    before = [conv.weight.clone() for conv in offsets]
    assert all((weight == 0).all() for weight in before)  # init_weights leaves them zero

    optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    batch = next(iter(runner.train_dataloader))
    # mmdet's ResNet starts with a zero scale at the end of every residual branch, where its
    # deformable convolutions are: only the second step reaches them.
    for _ in range(2):
        optim_wrapper.zero_grad()
        inputs = model.data_preprocessor(batch, training=True)
        loss, _ = model.parse_losses(model(**inputs, mode="loss"))
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        optim_wrapper.step()

    assert loss.isfinite() and loss > 0
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.isfinite().all(), name
    for conv, weight in zip(offsets, before, strict=True):
        assert conv.weight.grad.abs().max() > 0
        assert not torch.equal(conv.weight, weight)


def without_operators(config: Config) -> dict:
    if config.model.pop("rules", None):
        config.model.type = config.model.pop("model")
    config.model.backbone.pop("dcn", None)
    config.model.backbone.pop("stage_with_dcn", None)
    config.model.roi_head.pop("bbox_roi_extractor")
    if config.model.roi_head.pop("mimicking", None):
        config.model.type = config.model.type.removeprefix("mmdeform.")
        config.model.roi_head.type = "StandardRoIHead"
    config.optim_wrapper.pop("constructor", None)
    config.optim_wrapper.paramwise_cfg.pop("offset", None)
    return config.to_dict()


@pytest.mark.parametrize("path", [p for p in SMALL if "rcnn_r" in p.stem], ids=name_of)
def test_twins_differ_in_their_operators_only(path: Path) -> None:
    detector, backbone, *form = path.stem.split("_")
    plain = "_".join([detector, backbone.split("-")[0], *form])
    ours, theirs = Config.fromfile(path), Config.fromfile(ROOT / "configs/dcnv2" / f"{plain}.py")
    assert without_operators(ours) == without_operators(theirs)


@pytest.mark.parametrize(
    ("name", "key", "multiplier"),
    [
        ("dcnv2/mask-rcnn_r50-mdconv-c3-c5_shapes", "conv_offset", 0.1),
        ("dcn/faster-rcnn_r50-dpool_shapes", "offset_fc", 0.01),
        ("dcnv2/faster-rcnn_r50-mdpool-paper_shapes", "offset_fc", 1.0),
        ("dcn/faster-rcnn_r50-dconv-c5-dpool_dc5_14e-600px_voc0712", "offset_fc", 0.01),
        ("dcnv2/faster-rcnn_r50-dconv-c3-c5-dpool_dc5_16e-1000px_coco", "offset_fc", 0.01),
        ("dcnv2/mask-rcnn_r50-mdconv-c3-c5-mdpool-mimic_dc5_16e-1000px_coco", "conv_offset", 0.1),
    ],
)
def test_offsets_learn_at_the_rates_of_the_papers(name: str, key: str, multiplier: float) -> None:
    cfg, model = built_on_meta(ROOT / f"configs/{name}.py")
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for parameter_name, parameter in model.named_parameters():
        expected = cfg.optim_wrapper.optimizer.lr * (multiplier if key in parameter_name else 1)
        assert rates[id(parameter)] == pytest.approx(expected), parameter_name


@pytest.mark.parametrize("path", WITHOUT_PYRAMID, ids=name_of)
def test_detectors_without_a_pyramid_have_the_settings_of_the_papers(path: Path) -> None:
    cfg, model = built_on_meta(path)
    words, second, voc = (
        set(re.split("[-_]", path.stem)),
        path.parent.name == "dcnv2",
        "voc" in path.stem,
    )
    epochs, drops, rate, batch, side = (
        (16, [10, 14], 0.02, 16, 1000)
        if second
        else ((14, [10], 0.002, 4, 600) if voc else (16, [11], 0.002, 4, 600))
    )
    assert cfg.train_cfg.max_epochs == epochs
    assert cfg.param_scheduler[1].milestones == drops
    assert cfg.optim_wrapper.optimizer.lr == rate
    assert cfg.auto_scale_lr.base_batch_size == batch
    assert cfg.train_dataloader.batch_size == (2 if second else 1)
    datasets = [cfg.train_dataloader.dataset, cfg.test_dataloader.dataset]
    if voc:
        assert datasets[0].times == 1
        assert cfg.test_evaluator.iou_thrs == [0.5, 0.7]
        datasets[0] = datasets[0].dataset.datasets[0]
    for dataset in datasets:
        (resize,) = (step for step in dataset.pipeline if step.type == "Resize")
        assert min(resize.scale) == side

    assert model.backbone.layer4[0].downsample[0].stride == (1, 1)
    assert {block.conv2.dilation for block in model.backbone.layer4} == {(2, 2)}
    for module in layers_of(model.backbone):
        assert module.deform_groups == (1 if second else 4)
    assert model.rpn_head.in_indices == (0,)
    assert model.rpn_head.rpn_conv.weight.shape[:2] == (1024 if second else 512, 1024)
    scales = [8, 16, 32] if voc else [2, 4, 8, 16, 32] if second else [4, 8, 16, 32]
    assert model.rpn_head.num_base_priors == 3 * len(scales)
    assert model.rpn_head.prior_generator.scales.tolist() == scales
    proposals = [
        part.max_per_img for part in (cfg.model.train_cfg.rpn_proposal, model.test_cfg.rpn)
    ]
    assert proposals == ([2000, 1000] if second else [300, 300])
    assert model.train_cfg.rcnn.sampler.num == (512 if second else 128)

    head = model.roi_head
    extractors = [head.bbox_roi_extractor, *([head.mask_roi_extractor] if head.with_mask else [])]
    for extractor, bins in zip(extractors, (7, 14), strict=False):
        assert extractor.in_indices == (1,) and extractor.featmap_strides == [16]
        (layer,) = extractor.roi_layers
        assert layer.output_size == (bins, bins)
        if isinstance(layer, DeformRoIPool):
            assert layer.head == "paper" and layer.gamma == 0.1
    assert [fc.in_features for fc in head.bbox_head.shared_fcs] == [256 * 49, 1024]
    assert head.bbox_head.num_classes == (20 if voc else 80)
    assert ("mimic" in words) == hasattr(head, "mimicking")
    if "mimic" in words:
        assert (head.mimicking.num_proposals, head.mimicking.crop_size) == (32, 224)


def test_readme_counts_parameters() -> None:
    readme = (ROOT / "configs/dcnv2/README.md").read_text()
    rows = re.findall(r"\]\(\./(.+?)\.py\) \| ([\d.]+) M \|", readme)
    assert {name for name, _ in rows} == {
        path.stem for path in WITHOUT_PYRAMID if path.parent.name == "dcnv2"
    }
    for name, millions in rows:
        _, model = built_on_meta(ROOT / f"configs/dcnv2/{name}.py")
        count = sum(p.numel() for key, p in model.named_parameters() if "mimicking" not in key)
        assert f"{count / 1e6:.1f}" == millions, name


@pytest.mark.parametrize("path", PAPER, ids=name_of)
def test_deformable_detr_has_the_settings_of_the_paper(path: Path) -> None:
    cfg, model = built_on_meta(path)
    words = set(path.stem.replace("_", "-").split("-"))
    assert cfg.model.num_queries == 300
    assert cfg.model.with_box_refine == ("refine" in words)
    assert cfg.model.as_two_stage == ("twostage" in words)
    levels = 1 if "single" in words else 4
    assert model.level_embed.shape == (levels, 256)
    for layer in layers_of(model):
        if isinstance(layer, MultiScaleDeformableAttention):
            own_level = isinstance(layer, SingleLevelDeformableAttention)
            assert layer.num_heads == 8
            assert layer.num_points == (1 if "k1" in words else 4)
            assert layer.num_levels == (1 if own_level else levels)
    norms = [m for m in model.neck.modules() if isinstance(m, torch.nn.GroupNorm)]
    # FPN has two convolutions per backbone level, and one more for C6.
    assert [norm.num_groups for norm in norms] == [32] * (7 if "fpn" in words else levels)

    head, assigner = model.bbox_head, model.bbox_head.assigner
    for losses in (
        [head.loss_cls.loss_weight, head.loss_bbox.loss_weight, head.loss_iou.loss_weight],
        [cost.weight for cost in assigner.match_costs],
    ):
        assert losses == [2, 5, 2]

    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert type(optim_wrapper.optimizer) is torch.optim.AdamW
    assert optim_wrapper.clip_grad_kwargs["max_norm"] == 0.1
    groups = optim_wrapper.optimizer.param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    slow = re.compile(r"^backbone\.|sampling_offsets|reference_points")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = 2e-5 if slow.search(name) else 2e-4
            assert rates[id(parameter)] == pytest.approx(rate), name
    assert cfg.train_cfg.max_epochs == 50
    assert cfg.auto_scale_lr.base_batch_size == 32
    (scheduler,) = cfg.param_scheduler
    assert scheduler.type == "MultiStepLR" and scheduler.gamma == 0.1
    assert scheduler.milestones == [40]


@pytest.mark.parametrize(
    "path", [path for path in TRANSFORMERS if path.stem.endswith("_shapes")], ids=name_of
)
def test_small_transformers_are_trained_alike(path: Path) -> None:
    reference = ROOT / "configs/deformable_detr/deformable-detr-refine_r50_shapes.py"
    ours, theirs = Config.fromfile(path).to_dict(), Config.fromfile(reference).to_dict()
    assert ours["model"]["test_cfg"] == theirs["model"]["test_cfg"]
    differing = ["model", "custom_imports", "attention", "embed_dims"]
    if path.stem == "deformable-detr_r50_shapes":
        assert ours["model"] == theirs["model"]
        differing = ["max_epochs", "train_cfg", "param_scheduler"]
    for key in differing:
        ours.pop(key, None), theirs.pop(key, None)
    assert ours == theirs


def documented(family: Path) -> set[Path]:
    """What the metafile and the tables of a family list: all but the rows of ablations."""
    return {path for path in family.rglob("*.py") if path.parent.name != "ablations"}


def test_every_family_is_documented() -> None:
    assert sorted({path.parent for path in CONFIGS}) == FAMILIES


@pytest.mark.parametrize("family", FAMILIES, ids=lambda path: path.name)
def test_metafile_names_what_is_there(family: Path) -> None:
    metafile = yaml.safe_load((family / "metafile.yml").read_text())
    collections = {collection["Name"] for collection in metafile["Collections"]}
    for collection in metafile["Collections"]:
        assert (ROOT / collection["README"]).is_file()
        assert collection["Paper"]["URL"].startswith("https://arxiv.org/abs/")
    listed = set()
    for model in metafile["Models"]:
        assert model["In Collection"] in collections
        config = ROOT / model["Config"]
        assert config.is_file() and config.stem == model["Name"]
        listed.add(config)
    assert listed == documented(family)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda path: path.name)
def test_readme_table_agrees_with_the_metafile(family: Path) -> None:
    readme = (family / "README.md").read_text()
    rows = {
        match[1]: line
        for line in readme.splitlines()
        if (match := re.search(r"\]\(\./([^)]+)\.py\)", line))
    }
    assert set(rows) == {
        str(path.relative_to(family).with_suffix("")) for path in documented(family)
    }
    for model in yaml.safe_load((family / "metafile.yml").read_text())["Models"]:
        row = rows[model["Config"].removeprefix(f"configs/{family.name}/").removesuffix(".py")]
        for result in model.get("Results", []):
            # A number that was published elsewhere and not reproduced here carries a mark.
            mark = "" if result["Dataset"] in ("shapes", "BCCD") else "[*†‡]"
            for value in result["Metrics"].values():
                cell = rf"\| {re.escape(str(value))}{mark} \|"
                assert re.search(cell, row), f"{value} of {model['Name']} in {row}"


def test_training_data_is_named_as_it_is_made() -> None:
    cfg = Config.fromfile(ROOT / "configs/_base_/datasets/shapes_instance.py")
    source = (ROOT / "tools" / "make_shapes.py").read_text()
    assert f"CLASSES = {cfg.metainfo.classes!r}".replace("'", '"') in source

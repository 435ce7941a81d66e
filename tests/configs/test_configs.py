"""Every shipped config builds; every small one trains; tables and metafiles name what is there."""

import importlib.util
import re
from collections import Counter
from pathlib import Path
from typing import Any

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

from mmdeform.layers import (
    DCNv3,
    DCNv4,
    DeformConv2dPack,
    DeformRoIPool,
    DeformRoIPoolPack,
    ModulatedDeformConv2dPack,
    ModulatedDeformRoIPoolPack,
    MultiScaleDeformableAttention,
    OffsetConv2d,
    OffsetLinear,
)

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("[!_]*/*.py"))
SMALL = [path for path in CONFIGS if path.stem.endswith("_shapes")]
FAMILIES = sorted(path.parent for path in (ROOT / "configs").glob("*/metafile.yml"))
MMDET_CONFIGS = Path(get_installed_path("mmdet"), ".mim", "configs")
COUNTERPARTS = sorted(
    path for name in ("dcn", "dcnv2") for path in MMDET_CONFIGS.glob(f"{name}/*.py")
)
# The class that a word in a config's name promises.
LAYERS = {
    "dconv": DeformConv2dPack,
    "mdconv": ModulatedDeformConv2dPack,
    "dpool": DeformRoIPoolPack,
    "mdpool": ModulatedDeformRoIPoolPack,
    "dcnv3": DCNv3,
    "dcnv4": DCNv4,
    "deformable": MultiScaleDeformableAttention,
}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def expected_layers(path: Path, model: ConfigDict) -> dict[type, int]:
    """The deformable layers that a config's name promises: their class and number."""
    words = re.split("[-_]", path.stem)
    if "deformable" in words:
        count = model.encoder.num_layers + model.decoder.num_layers
    elif {"dpool", "mdpool"} & set(words):
        count = 4  # one per level of the pyramid
    else:  # the 3x3 convolutions of c3 to c5
        count = 30 if {"r101", "x101"} & set(words) else 13
    return {LAYERS[word]: count for word in words if word in LAYERS}


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


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.spec_from_file_location("make_shapes", ROOT / "tools" / "make_shapes.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    out = tmp_path_factory.mktemp("data") / "shapes"
    tool.make_shapes(out, train=2, val=1, size=160, seed=0, overwrite=False)
    return out


def test_all_configs_are_found() -> None:
    names = {name_of(path) for path in CONFIGS}
    assert len(names) >= 33
    assert {"dcnv2/mask-rcnn_r50-mdconv-c3-c5_shapes", "dcnv2/mask-rcnn_r50_shapes"} < names


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_config_builds(path: Path) -> None:
    cfg = Config.fromfile(path)
    assert cfg.custom_imports == dict(imports=["mmdeform"], allow_failed_imports=False)
    assert cfg.default_scope == "mmdet"
    assert Config.fromstring(cfg.pretty_text, ".py").to_dict() == cfg.to_dict()
    init_default_scope("mmdet")
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    assert Counter(map(type, layers_of(model))) == expected_layers(path, cfg.model)


@pytest.mark.parametrize("path", COUNTERPARTS, ids=name_of)
def test_counterpart_differs_from_mmdets_in_the_operators_only(path: Path) -> None:
    ours = without_scope(Config.fromfile(ROOT / "configs" / path.parent.name / path.name).to_dict())
    assert ours.pop("custom_imports")
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
    config.model.backbone.pop("dcn", None)
    config.model.backbone.pop("stage_with_dcn", None)
    config.model.roi_head.pop("bbox_roi_extractor")
    config.optim_wrapper.pop("constructor", None)
    config.optim_wrapper.paramwise_cfg.pop("offset", None)
    return config.to_dict()


@pytest.mark.parametrize("path", [p for p in SMALL if "rcnn" in p.stem], ids=name_of)
def test_twins_differ_in_their_operators_only(path: Path) -> None:
    plain = ROOT / "configs" / "dcnv2" / f"{path.stem.split('_')[0]}_r50_shapes.py"
    ours, theirs = Config.fromfile(path), Config.fromfile(plain)
    assert without_operators(ours) == without_operators(theirs)


@pytest.mark.parametrize(
    ("name", "key", "multiplier"),
    [
        ("dcnv2/mask-rcnn_r50-mdconv-c3-c5_shapes", "conv_offset", 0.1),
        ("dcn/faster-rcnn_r50-dpool_shapes", "offset_fc", 0.01),
        ("dcnv2/faster-rcnn_r50-mdpool-paper_shapes", "offset_fc", 1.0),
    ],
)
def test_offsets_learn_at_the_rates_of_the_papers(name: str, key: str, multiplier: float) -> None:
    cfg = Config.fromfile(ROOT / f"configs/{name}.py")
    init_default_scope("mmdet")
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for parameter_name, parameter in model.named_parameters():
        expected = cfg.optim_wrapper.optimizer.lr * (multiplier if key in parameter_name else 1)
        assert rates[id(parameter)] == pytest.approx(expected), parameter_name


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
    assert listed == set(family.glob("*.py"))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda path: path.name)
def test_readme_table_agrees_with_the_metafile(family: Path) -> None:
    readme = (family / "README.md").read_text()
    rows = {
        match[1]: line
        for line in readme.splitlines()
        if (match := re.search(r"\]\(\./([^)]+)\.py\)", line))
    }
    assert set(rows) == {path.stem for path in family.glob("*.py")}
    for model in yaml.safe_load((family / "metafile.yml").read_text())["Models"]:
        row = rows[model["Name"]]
        for result in model.get("Results", []):
            # A number that was published elsewhere and not reproduced here carries a star.
            star = "" if result["Dataset"] == "shapes" else "*"
            for value in result["Metrics"].values():
                assert f"| {value}{star} |" in row, f"{value} of {model['Name']} in {row}"


def test_training_data_is_named_as_it_is_made() -> None:
    cfg = Config.fromfile(ROOT / "configs/_base_/datasets/shapes_instance.py")
    source = (ROOT / "tools" / "make_shapes.py").read_text()
    assert f"CLASSES = {cfg.metainfo.classes!r}".replace("'", '"') in source

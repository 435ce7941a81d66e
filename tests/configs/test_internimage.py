"""The configs of InternImage and FlashInternImage: published settings and sizes."""

import copy
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("mmdet")
from mmdet.registry import MODELS, TRANSFORMS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from torch import nn

from mmdeform import typed_attention
from mmdeform.layers import DCNv3, DCNv4, LN2d, MultiScaleDeformableAttention

CONFIGS = Path(__file__).parents[2] / "configs"


class Published(NamedTuple):
    """What a config of the authors says, and the size of our model."""

    drop_path_rate: float
    images: int  # on each GPU
    batch: int
    lr: float
    decay_rate: float
    parameters: int


HUGGING_FACE = "https://huggingface.co/OpenGVLab"
FAMILIES = {  # type, layer, pretrained weights
    "internimage": (
        "mmdeform.InternImage",
        DCNv3,
        f"{HUGGING_FACE}/InternImage/resolve/main/internimage_{{}}_1k_224.pth",
    ),
    "flash-internimage": (
        "mmdeform.FlashInternImage",
        DCNv4,
        f"{HUGGING_FACE}/DCNv4/resolve/main/flash_intern_image_{{}}_1k_224.pth",
    ),
}
SIZES = {  # architecture, channels, depths
    "t": ("tiny", 64, (4, 4, 18, 4)),
    "s": ("small", 80, (4, 4, 21, 4)),
    "b": ("base", 112, (4, 4, 21, 4)),
}
PUBLISHED = {
    "mask-rcnn_internimage-t_fpn_1x_coco": Published(0.2, 2, 16, 1e-4, 1.0, 48_920_544),
    "mask-rcnn_internimage-s_fpn_1x_coco": Published(0.3, 2, 16, 1e-4, 1.0, 68_715_024),
    "mask-rcnn_internimage-b_fpn_1x_coco": Published(0.4, 2, 16, 1e-4, 1.0, 115_245_264),
    "mask-rcnn_internimage-t_fpn_ms-crop-3x_coco": Published(0.2, 2, 16, 1e-4, 1.0, 48_920_544),
    "mask-rcnn_internimage-s_fpn_ms-crop-3x_coco": Published(0.3, 2, 16, 1e-4, 1.0, 68_715_024),
    "mask-rcnn_internimage-b_fpn_ms-crop-3x_coco": Published(0.4, 2, 16, 1e-4, 1.0, 115_245_264),
    "dino-4scale_internimage-t_8xb2-12e_coco": Published(0.2, 2, 16, 1e-4, 0.9, 48_736_828),
    "mask-rcnn_flash-internimage-t_fpn_1x_coco": Published(0.2, 2, 16, 1e-4, 1.0, 48_819_696),
    "mask-rcnn_flash-internimage-s_fpn_1x_coco": Published(0.3, 2, 16, 1e-4, 1.0, 68_704_688),
    "mask-rcnn_flash-internimage-b_fpn_1x_coco": Published(0.3, 2, 16, 1e-4, 1.0, 115_234_440),
    "mask-rcnn_flash-internimage-t_fpn_ms-crop-3x_coco": Published(
        0.2, 2, 64, 1e-4, 1.0, 48_819_696
    ),
    "mask-rcnn_flash-internimage-s_fpn_ms-crop-3x_coco": Published(
        0.4, 8, 64, 2e-4, 1.0, 68_704_688
    ),
    "mask-rcnn_flash-internimage-b_fpn_ms-crop-3x_coco": Published(
        0.4, 4, 64, 2e-4, 0.9, 115_234_440
    ),
    "dino-4scale_flash-internimage-t_8xb4-12e_coco": Published(0.2, 4, 32, 2e-4, 0.9, 48_633_932),
    "dino-4scale_flash-internimage-s_8xb4-12e_coco": Published(0.3, 4, 32, 2e-4, 0.9, 68_809_740),
    "dino-4scale_flash-internimage-b_8xb4-12e_coco": Published(0.3, 4, 32, 2e-4, 0.9, 115_921_124),
}


def parts(name: str) -> tuple[str, str, str]:
    """Detector, family and size in the name of a config."""
    detector, family, size = re.match(
        r"(mask-rcnn|dino)[\w-]*?_([a-z-]*internimage)-(\w)_", name
    ).groups()
    return detector, family, size


def folder(name: str) -> Path:
    return CONFIGS / parts(name)[1].replace("-", "_")


@functools.cache
def config(name: str) -> Config:
    return Config.fromfile(folder(name) / f"{name}.py")


@functools.cache
def built_on_meta(name: str) -> nn.Module:
    """A detector without memory for the weights."""
    with torch.device("meta"):
        return MODELS.build(copy.deepcopy(config(name).model))


@pytest.fixture(autouse=True)
def mmdet_with_typed_attention() -> Iterator[None]:
    init_default_scope("mmdet")
    # A config imports it, but another test may have disabled it since the first import.
    typed_attention.enable()
    yield
    typed_attention.disable()


def test_there_is_a_config_for_every_published_detector() -> None:
    names = {p.stem for p in CONFIGS.glob("*internimage/*_coco.py")}
    assert names == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_detectors_have_the_published_settings(name: str) -> None:
    cfg, published, (detector, family, size) = config(name), PUBLISHED[name], parts(name)
    (kind, _, weights), (arch, channels, _) = FAMILIES[family], SIZES[size]
    dino = detector == "dino"
    first = 1 if dino else 0
    assert cfg.model.backbone == dict(
        type=kind,
        arch=arch,
        drop_path_rate=published.drop_path_rate,
        init_cfg=dict(type="Pretrained", checkpoint=weights.format(size)),
        **(dict(out_indices=(1, 2, 3)) if dino else {}),
        **(dict(with_cp=True) if dino or "flash" in family else {}),
    )
    assert cfg.model.neck.in_channels == [channels * 2**stage for stage in range(first, 4)]
    assert cfg.model.data_preprocessor.pad_size_divisor == 32

    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr) == ("AdamW", published.lr)
    assert optimizer.weight_decay == (0.0001 if dino else 0.05)
    assert cfg.optim_wrapper.get("clip_grad") == (dict(max_norm=0.1, norm_type=2) if dino else None)
    assert cfg.train_dataloader.batch_size == published.images
    assert cfg.auto_scale_lr.base_batch_size == published.batch
    epochs, steps = (36, [27, 33]) if "3x" in name else (12, [11] if dino else [8, 11])
    warmup, drops = cfg.param_scheduler
    assert (warmup.type, warmup.start_factor, warmup.by_epoch) == ("LinearLR", 0.001, False)
    assert (warmup.begin, warmup.end) == (0, 500)
    assert (drops.type, drops.gamma, drops.milestones) == ("MultiStepLR", 0.1, steps)
    assert cfg.train_cfg.max_epochs == drops.end == epochs

    imports = ["mmdeform", "mmdeform.typed_attention"][: 2 if dino else 1]
    assert cfg.custom_imports == dict(imports=imports, allow_failed_imports=False)
    assert cfg.default_scope == "mmdet"


def test_a_parsed_config_can_be_written_and_read() -> None:
    cfg = config("dino-4scale_flash-internimage-s_8xb4-12e_coco")
    assert Config.fromstring(cfg.pretty_text, ".py").to_dict() == cfg.to_dict()


@pytest.mark.parametrize("name", PUBLISHED)
def test_images_are_augmented_as_published(name: str) -> None:
    dataset = config(name).train_dataloader.dataset
    dino = parts(name)[0] == "dino"
    assert dataset.filter_cfg.filter_empty_gt
    for step in dataset.pipeline:
        TRANSFORMS.build(step)
    load, annotations, *augment, pack = dataset.pipeline
    assert (load.type, pack.type) == ("LoadImageFromFile", "PackDetInputs")
    assert (annotations.with_bbox, annotations.get("with_mask", False)) == (True, not dino)
    flip = dict(type="RandomFlip", prob=0.5)
    if "_1x_" in name:
        assert augment == [dict(type="Resize", scale=(1333, 800), keep_ratio=True), flip]
        return
    assert augment[0] == flip
    (whole,), (before, crop, after) = augment[1].transforms
    sizes = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert whole.scales == after.scales == [(short, 1333) for short in sizes]
    assert before.scales == [(short, 4200 if dino else 1333) for short in (400, 500, 600)]
    assert (crop.crop_type, crop.crop_size) == ("absolute_range", (384, 600))
    assert crop.allow_negative_crop == (not dino)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "3x" not in name])
def test_detectors_build(name: str) -> None:
    model, (detector, family, size) = built_on_meta(name), parts(name)
    layer, depths = FAMILIES[family][1], SIZES[size][2]
    blocks = sum(isinstance(module, layer) for module in model.backbone.modules())
    assert blocks == sum(depths)
    attention = [m for m in model.modules() if isinstance(m, MultiScaleDeformableAttention)]
    assert len(attention) == (12 if detector == "dino" else 0)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == PUBLISHED[name].parameters
    if detector == "mask-rcnn":
        longer = copy.deepcopy(config(name.replace("1x", "ms-crop-3x")).model)
        longer.backbone.drop_path_rate = config(name).model.backbone.drop_path_rate
        assert longer == config(name).model


@pytest.mark.parametrize("name", PUBLISHED)
def test_tables_tell_the_size(name: str) -> None:
    readme = (folder(name) / "README.md").read_text()
    (row,) = re.findall(rf"^.*\(\./{re.escape(name)}\.py\).*$", readme, re.M)
    assert f" {PUBLISHED[name].parameters / 1e6:.1f} M |" in row


def layer_of(name: str, depths: tuple[int, ...]) -> int:
    """The layer of a parameter in the authors' code; the stem is 0, heads come last."""
    last = sum(depths) + 1
    if name == "level_embed" or name.startswith("backbone.patch_embed."):
        return 0
    if not (match := re.match(r"backbone\.levels\.(\d)\.(blocks\.(\d+)|norm|downsample)\.", name)):
        assert not name.startswith("backbone.")
        return last
    stage = int(match[1])
    if match[3]:
        return sum(depths[:stage]) + int(match[3]) + 1
    return {0: depths[0], 1: sum(depths[:2]), 2: sum(depths[:3]), 3: sum(depths[:3])}[stage] + 1


@pytest.mark.parametrize(
    "name",
    [
        "mask-rcnn_internimage-t_fpn_1x_coco",
        "dino-4scale_internimage-t_8xb2-12e_coco",
        "mask-rcnn_flash-internimage-b_fpn_ms-crop-3x_coco",
        "dino-4scale_flash-internimage-b_8xb4-12e_coco",
    ],
)
def test_every_parameter_learns_and_decays_as_published(name: str) -> None:
    cfg, published, (_, _, size) = config(name), PUBLISHED[name], parts(name)
    depths = SIZES[size][2]
    model = built_on_meta(name.replace("ms-crop-3x", "1x"))
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    found = {
        id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    rates = set()
    for key, parameter in model.named_parameters():
        lr = published.lr * published.decay_rate ** (sum(depths) + 1 - layer_of(key, depths))
        if "3x" in name and ".offset_mask." in key:
            lr *= 0.01
        spared = parameter.ndim == 1 or "sampling_offsets" in key
        decay = 0.0 if spared else cfg.optim_wrapper.optimizer.weight_decay
        assert found[id(parameter)] == pytest.approx((lr, decay)), key
        rates.add(lr)
    layers = sum(depths) + 2
    assert (
        len(rates)
        == {1.0: 1, 0.9: 2 * layers - 2 if "3x" in name else layers}[published.decay_rate]
    )


def test_pyramids_of_flash_intern_image_have_the_published_names() -> None:
    neck = built_on_meta("mask-rcnn_flash-internimage-t_fpn_1x_coco").neck
    assert {key: tuple(value.shape) for key, value in neck.state_dict().items()} == {
        f"{convs}.{level}.{leaf}": shape
        for convs, kernel in (("lateral_convs", 1), ("fpn_convs", 3))
        for level in range(4)
        for leaf, shape in {
            "conv.weight": (256, 64 * 2**level if kernel == 1 else 256, kernel, kernel),
            "ln.weight": (256,),
            "ln.bias": (256,),
        }.items()
    }
    assert sum(isinstance(module, LN2d) and module.eps == 1e-5 for module in neck.modules()) == 8


def test_small_detectors_differ_in_their_backbones_only() -> None:
    flash = Config.fromfile(CONFIGS / "flash_internimage/mask-rcnn_flash-internimage-t_shapes.py")
    plain = Config.fromfile(CONFIGS / "internimage/mask-rcnn_internimage-t_shapes.py")
    assert flash.model.backbone.pop("type") == "mmdeform.FlashInternImage"
    assert plain.model.backbone.pop("type") == "mmdeform.InternImage"
    assert flash.to_dict() == plain.to_dict()

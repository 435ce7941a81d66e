"""Every shipped ablation can be planned on all its data, and its models be built."""

import functools
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml

pytest.importorskip("mmdet")
from mmengine.config import Config, utils
from mmengine.config import config as config_module
from mmengine.registry import MODELS, init_default_scope

from mmdeform.ablation import load_spec, plan_rows
from mmdeform.ablation.overrides import canonical

SPECS = sorted((Path(__file__).parents[2] / "configs" / "_ablations").glob("*.yml"))
ROWS = {
    "dat_offsets": 7,
    "dat_stages": 5,
    "dcnv2_stages": 15,
    "deform_groups": 4,
    "deformable_detr": 6,
    "detr": 2,
    "kernels": 5,
    "layers": 9,
    "offset_lr": 4,
    "rfcn_layers": 10,
    "roi_pooling": 3,
}


@pytest.fixture(scope="module", autouse=True)
def look_for_packages_once() -> Iterator[None]:
    """For each ``mmdet::`` mmengine looks mmdet up and reads all its metafiles."""
    with (
        patch.object(config_module, "is_installed", functools.cache(config_module.is_installed)),
        patch.object(utils, "load", functools.cache(utils.load)),
    ):
        yield


def test_all_are_here() -> None:
    assert [path.stem for path in SPECS] == list(ROWS)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
@pytest.mark.parametrize("base", ["shapes", "coco"])
def test_is_planned(path: Path, base: str) -> None:
    spec = load_spec(path)
    assert spec.name.replace("-", "_") == path.stem
    assert list(spec.bases) == ["shapes", "coco"] and len(spec.seeds) >= 3
    rows = plan_rows(spec, base)
    assert len(rows) == ROWS[path.stem]
    assert sum(row.is_base for row in rows) == 1
    if base == "coco":
        return
    init_default_scope("mmdet")
    for row in rows:
        with torch.device("meta"):
            MODELS.build(row.config.model)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_is_planned_on_boxes_alone(path: Path) -> None:
    spec = load_spec(path).with_data(yaml.safe_load((path.parent / "data/bccd.yml").read_text()))
    assert spec.metrics and not [name for name in spec.metrics if "segm" in name]
    init_default_scope("mmdet")
    for row in plan_rows(spec, "shapes"):
        assert row.config.train_dataloader.dataset.data_root == "data/bccd/"
        assert row.config.val_evaluator.metric == "bbox"
        assert "mask_head" not in row.config.model.get("roi_head", {})
        with torch.device("meta"):
            MODELS.build(row.config.model)


@pytest.mark.parametrize(
    ("spec", "base", "row", "config"),
    [
        ("kernels", "shapes", "dcnv3", "dcnv3/faster-rcnn_r50-dcnv3-c3-c5_shapes"),
        ("kernels", "coco", "dcnv4", "dcnv4/faster-rcnn_r50-dcnv4-c3-c5_fpn_1x_coco"),
        ("kernels", "coco", "mdconv", "dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco"),
        ("roi_pooling", "shapes", "mdpool", "dcnv2/faster-rcnn_r50-mdpool_shapes"),
        ("roi_pooling", "coco", "dpool", "dcn/faster-rcnn_r50_fpn_dpool_1x_coco"),
        ("roi_pooling", "coco", "mdpool", "dcnv2/faster-rcnn_r50_fpn_mdpool_1x_coco"),
        (
            "deformable_detr", "coco", "single_k1",
            "deformable_detr/deformable-detr-single-scale-k1_r50_16xb2-50e_coco",
        ),
        (
            "deformable_detr", "coco", "multi_within_k1",
            "deformable_detr/deformable-detr-ms-inputs-k1_r50_16xb2-50e_coco",
        ),
        (
            "deformable_detr", "coco", "multi-fpn_k4",
            "deformable_detr/deformable-detr_r50_fpn_16xb2-50e_coco",
        ),
        (
            "deformable_detr", "shapes", "multi_within_k1",
            "deformable_detr/deformable-detr-refine-ms-inputs-k1_r50_shapes",
        ),
        (
            "deformable_detr", "shapes", "single_k1",
            "deformable_detr/deformable-detr-refine-single-scale-k1_r50_shapes",
        ),
        (
            "deformable_detr", "shapes", "multi-fpn_k4",
            "deformable_detr/deformable-detr-refine_r50_fpn_shapes",
        ),
        ("rfcn_layers", "coco", "dconv-2_rigid", "rfcn/ablations/dconv-2"),
        ("rfcn_layers", "coco", "dilation-x4_rigid", "rfcn/ablations/dilation-8"),
        ("rfcn_layers", "shapes", "plain_deformable", "rfcn/rfcn_r50-dpspool_shapes"),
        (
            "dcnv2_stages", "coco", "c3-c5_mdconv_mdpool",
            "dcnv2/faster-rcnn_r50-mdconv-c3-c5-mdpool_dc5_16e-1000px_coco",
        ),
        (
            "dcnv2_stages", "coco", "c5_dconv_dpool",
            "dcnv2/faster-rcnn_r50-dconv-c5-dpool_dc5_16e-1000px_coco",
        ),
        (
            "dcnv2_stages", "shapes", "c3-c5_mdconv_mdpool",
            "dcnv2/faster-rcnn_r50-mdconv-c3-c5-mdpool_dc5_shapes",
        ),
        ("deform_groups", "shapes", "4", "dcnv2/mask-rcnn_r50-mdconv-group4-c3-c5_shapes"),
        ("layers", "shapes", "none_mdpool", "dcnv2/faster-rcnn_r50-mdpool_shapes"),
        ("layers", "coco", "none_dpool", "dcn/faster-rcnn_r50_fpn_dpool_1x_coco"),
        ("layers", "coco", "c3-c5_mdconv", "dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco"),
        ("detr", "shapes", "dense", "detr/detr-dc5_r50_shapes"),
        ("detr", "shapes", "deformable", "deformable_detr/deformable-detr-no-refine_r50_shapes"),
        ("dat_offsets", "coco", "off_none_windows", "dat/ablations/offsets-off_bias-none"),
        ("dat_offsets", "coco", "on_relative_pvt", "dat/ablations/offsets-on_bias-relative_pvt"),
        ("dat_stages", "coco", "1-4", "dat/ablations/stages-1-4"),
    ],
)  # fmt: skip
def test_has_the_model_of_a_config(
    spec: str, base: str, row: str, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RFCN_BASE", "rfcn_r50_coco")
    path = SPECS[0].parent / f"{spec}.yml"
    rows = {row.name: row.config.model for row in plan_rows(load_spec(path), base)}
    expected = Config.fromfile(path.parents[1] / f"{config}.py").model
    assert canonical(Config(dict(model=rows[row]))) == canonical(Config(dict(model=expected)))


def test_detrs_are_trained_as_long() -> None:
    for base, epochs in (("shapes", 12), ("coco", 50)):
        rows = plan_rows(load_spec(SPECS[0].with_name("detr.yml")), base)
        assert [row.config.train_cfg.max_epochs for row in rows] == [epochs, epochs]
        schedules = [row.config.param_scheduler for row in rows]
        assert schedules[0] == schedules[1] and schedules[0][-1]["end"] == epochs


def test_slow_offsets_are_the_same_everywhere() -> None:
    for base in ("shapes", "coco"):
        rows = plan_rows(load_spec(SPECS[0].with_name("offset_lr.yml")), base)
        rates = [row.config.optim_wrapper.get("paramwise_cfg") or {} for row in rows]
        assert [rate.get("dcn_offset_lr_mult", 1.0) for rate in rates] == [1.0, 0.1, 0.01, 0.0]
        for row in plan_rows(load_spec(SPECS[0].with_name("dcnv2_stages.yml")), base):
            if row.labels["convolution"] != "-":
                assert row.config.optim_wrapper.paramwise_cfg.dcn_offset_lr_mult == 0.1

"""Plans: overrides that mean something, other data, costs."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmdet")
from mmengine import Config
from mmengine.registry import MODELS, init_default_scope

from mmdeform.ablation import apply_overrides, config_hash, measure, plan_rows, use_coco_data

from .small import BASE, base_config, small_spec

DETECTOR = Path(__file__).parents[2] / "configs/dcnv2/faster-rcnn_r18_shapes.py"


@pytest.mark.parametrize(
    ("overrides", "part", "expected"),
    [
        ({"model.depth": 5}, "model.depth", 5),
        ({"model": dict(depth=5)}, "model.depth", 5),
        ({"model.new": dict(a=1)}, "model.new.a", 1),
        ({"optim_wrapper.optimizer.lr": 0.2}, "optim_wrapper.optimizer.lr", 0.2),
        ({"randomness": dict(deterministic=True)}, "randomness.deterministic", True),
        ({"optim_wrapper": dict(_delete_=True, a=1)}, "optim_wrapper", dict(a=1)),
        ({"model.depth": dict(_delete_=True, a=1)}, "model.depth", dict(a=1)),
    ],
)
def test_overrides(overrides: dict[str, Any], part: str, expected: Any) -> None:
    cfg = base_config()
    before = cfg.to_dict()
    found = apply_overrides(cfg, overrides)
    for name in part.split("."):
        found = found[name]
    assert found == expected
    assert cfg.to_dict() == before


def test_overrides_name_parts_of_lists() -> None:
    assert apply_overrides(base_config(), {"model.parts.1.size": 9}).model.parts == [
        dict(size=1), dict(size=9),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"model": dict(new=dict(a=1, b=1)), "model.new.b": 2}, dict(a=1, b=2)),
        ({"model.new": dict(a=1), "model.new.b": dict(c=2)}, dict(a=1, b=dict(c=2))),
        ({"model.new": dict(a=1), "model": dict(new=dict(_delete_=True, b=2))}, dict(b=2)),
    ],
)
def test_overrides_within_others(overrides: dict[str, Any], expected: Any) -> None:
    assert apply_overrides(base_config(), overrides).model.new == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"modle.depth": 5}, r"modle is no part of a config, did you mean 'model'\?"),
        ({"milestone": 5}, "milestone is a variable of the config file"),
        ({"optim_wrapper.optimzer.lr": 1}, "optim_wrapper.optimzer is not in the base config, did"),
        ({"model.depth.x": 1}, "model.depth is 1 in the base config: model.depth.x needs _delete_"),
        ({"model": dict(depth=dict(x=1))}, "model.depth is 1 in the base config"),
        ({"model.parts.2.size": 1}, "model.parts is a list of 2: no model.parts.2"),
        ({"model.new": dict(_delete_=True)}, "model.new: _delete_ where nothing is"),
        ({"model.depth": 1}, "model.depth: changes nothing"),
        ({"model": dict(parts=(dict(size=1), dict(size=2)))}, "model: changes nothing"),
        ({}, "no override: changes nothing"),
        ({1: 2}, "expected a dotted name, got 1"),
    ],
)
def test_overrides_that_mean_nothing(overrides: dict[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_overrides(base_config(), overrides)


def test_hash_is_that_of_what_is_said() -> None:
    cfg = base_config()
    reordered = Config(dict(reversed(cfg.to_dict().items())))
    assert config_hash(cfg) == config_hash(reordered)
    assert config_hash(cfg) != config_hash(apply_overrides(cfg, {"model.depth": 2}))


def test_rows_have_all_their_overrides(tmp_path: Path) -> None:
    axes = dict(
        depth={"one": {}, "two": {"model.depth": 2}},
        lr={"low": {}, "high": {"optim_wrapper.optimizer.lr": 1.0}},
    )
    spec = small_spec(tmp_path, axes=axes, overrides={"train_cfg.max_epochs": 5})
    rows = plan_rows(spec, overrides={"train_cfg.val_interval": 2})
    found = {
        row.name: (row.config.model.depth, row.config.optim_wrapper.optimizer.lr) for row in rows
    }
    assert found == dict(one_low=(1, 0.1), one_high=(1, 1.0), two_low=(2, 0.1), two_high=(2, 1.0))
    assert [row.is_base for row in rows] == [True, False, False, False]
    assert len({row.hash for row in rows}) == 4
    for row in rows:
        assert (row.config.train_cfg.max_epochs, row.config.train_cfg.val_interval) == (5, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(axes=dict(depth={"one": {}, "two": {"model.depht.x": 2}})),
            "row two: depth: two: model.depht is not in the base config, did you mean 'depth'",
        ),
        (
            dict(axes=dict(d={"a": {"model.depth": 2}, "b": {"model.depth": 2}})),
            "the rows a and b have the same config",
        ),
        (dict(overrides={"model.depth": 1}), "overrides: model.depth: changes nothing"),
        (dict(overrides={"train_cfg.by_epoch": False}), "train_cfg: expected epochs"),
        (
            dict(overrides={"default_hooks.checkpoint.by_epoch": False}),
            "default_hooks.checkpoint: expected a checkpoint by epoch",
        ),
        (dict(base="nothing.py"), "base: .*nothing.py cannot be read"),
    ],
)
def test_plan_refuses(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_rows(small_spec(tmp_path, **changes))


def test_base_is_chosen_by_name(tmp_path: Path) -> None:
    spec = small_spec(tmp_path, base=dict(x="base.py", y="base.py"))
    plan_rows(spec, "y")
    with pytest.raises(ValueError, match="base: expected one of 'x', 'y', got 'z'"):
        plan_rows(spec, "z")


def test_overrides_that_go_with_a_base(tmp_path: Path) -> None:
    two = {
        "model": dict(parts=[], depth=5),
        "by_base": dict(x={"model": dict(depth=2)}, y={"model": dict(depth=3)}),
    }
    other = dict(by_base=dict(y={"model.depth": 4}, x=None))
    spec = small_spec(tmp_path, base=dict(x="base.py", y="base.py"),
                      axes=dict(d=dict(one=other, two=two)))  # fmt: skip
    for base, depths in (("x", [1, 2]), ("y", [4, 3])):
        rows = plan_rows(spec, base)
        assert [row.config.model.depth for row in rows] == depths
        assert rows[1].config.model.parts == []
    with pytest.raises(ValueError, match="unknown base in 'by_base' of 'a': 'z'"):
        small_spec(tmp_path, axes=dict(d=dict(a=dict(by_base=dict(z={})))))


def test_a_row_may_have_a_config_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(BASE.replace("'Fake'", "'Other'"))
    deep = {"config": "base.py", "model.depth": 2}
    two = {"model.depth": 3, "by_base": dict(x={"config": "other.py"}, y=deep)}
    axes = dict(d=dict(one={}, two=two), lr=dict(low={}, high={"optim_wrapper.optimizer.lr": 1.0}))
    spec = small_spec(tmp_path, base=dict(x="base.py", y="other.py"), axes=axes,
                      overrides={"train_cfg.max_epochs": 5})  # fmt: skip
    for base, expected in (
        ("x", [("Fake", 1, 0.1), ("Fake", 1, 1.0), ("Other", 3, 0.1), ("Other", 3, 1.0)]),
        ("y", [("Other", 1, 0.1), ("Other", 1, 1.0), ("Fake", 2, 0.1), ("Fake", 2, 1.0)]),
    ):
        configs = [row.config for row in plan_rows(spec, base, overrides={"model.fails": True})]
        found = [(c.model.type, c.model.depth, c.optim_wrapper.optimizer.lr) for c in configs]
        assert found == expected
        assert all(cfg.train_cfg.max_epochs == 5 and cfg.model.fails for cfg in configs)
        assert all("config" not in cfg for cfg in configs)


def test_a_row_with_a_config_of_its_own_has_the_other_data(tmp_path: Path) -> None:
    axes = dict(depth=dict(r50={}, r18=dict(config=str(DETECTOR))))
    spec = small_spec(
        tmp_path, base=str(DETECTOR.with_name("faster-rcnn_r50_shapes.py")), axes=axes
    )
    for row in plan_rows(spec.with_data(DATA)):
        assert row.config.train_dataloader.dataset.data_root == "data/pets"
        assert row.config.model.roi_head.bbox_head.num_classes == 2


def test_configs_of_rows_are_checked(tmp_path: Path) -> None:
    both = dict(config="base.py")
    with pytest.raises(ValueError, match=r"axes: d: a: config: expected a file, got \['x'\]"):
        small_spec(tmp_path, axes=dict(d=dict(a=dict(config=["x"]))))
    with pytest.raises(ValueError, match="axes: d: a: by_base: : config: expected a file, got 1"):
        small_spec(tmp_path, axes=dict(d=dict(a=dict(by_base={"": dict(config=1)}))))
    spec = small_spec(tmp_path, axes=dict(d=dict(a=both), e=dict(a=both)))
    with pytest.raises(
        ValueError, match=r"row a_a: expected one 'config', got .*base.py, .*base.py"
    ):
        plan_rows(spec)
    spec = small_spec(tmp_path, axes=dict(d=dict(a={}, b=dict(config="other.py"))))
    with pytest.raises(ValueError, match=r"other.py cannot be read"):
        plan_rows(spec)
    (tmp_path / "other.py").write_text(BASE.replace("depth=1", "depth=2"))
    with pytest.raises(ValueError, match=r"other.py: options: model.depth: changes nothing"):
        plan_rows(spec, overrides={"model.depth": 2})


@pytest.fixture(scope="module")
def detector() -> Config:
    return Config.fromfile(DETECTOR)


DATA: dict[str, Any] = dict(
    root="data/pets",
    classes=["cat", "dog"],
    train=dict(annotations="a/train.json", images="img/train/"),
    val=dict(annotations="a/val.json", images="img/val/"),
)


def test_other_data(detector: Config) -> None:
    cfg = use_coco_data(detector, DATA)
    for loader, split in (("train", "train"), ("val", "val"), ("test", "val")):
        dataset = cfg[f"{loader}_dataloader"].dataset
        assert (dataset.data_root, dataset.ann_file) == ("data/pets", f"a/{split}.json")
        assert dataset.data_prefix.img == f"img/{split}/"
        assert dataset.metainfo == dict(classes=("cat", "dog"))
        assert dataset.pipeline == detector[f"{loader}_dataloader"].dataset.pipeline
    assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file == "data/pets/a/val.json"
    assert cfg.model.roi_head.bbox_head.num_classes == 2
    assert detector.model.roi_head.bbox_head.num_classes == 5


def test_data_of_the_spec_and_in_its_place(tmp_path: Path) -> None:
    axes = dict(lr=dict(high=None, low={"optim_wrapper.optimizer.lr": 1e-4}))
    spec = small_spec(tmp_path, base=str(DETECTOR), axes=axes, data=DATA)
    cars = spec.with_data(dict(DATA, root="data/cars"))
    for chosen, root in ((spec, "data/pets"), (cars, "data/cars")):
        for row in plan_rows(chosen):
            assert row.config.train_dataloader.dataset.data_root == root


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(clases=[]), "data: expected the keys root, classes, train, val"),
        (dict(classes=[]), "data: classes: expected a list of names"),
        (dict(val=dict(images="")), "data: val: expected the keys annotations, images"),
        (dict(masks=0), "data: masks: expected true or false, got 0"),
    ],
)
def test_other_data_refuses(detector: Config, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        use_coco_data(detector, DATA | change)


def test_other_data_needs_a_coco_config(detector: Config) -> None:
    cfg = apply_overrides(detector, {"val_dataloader.dataset.type": "VOCDataset"})
    with pytest.raises(
        ValueError, match=r"val_dataloader.*expected .* CocoDataset, .*'VOCDataset'"
    ):
        use_coco_data(cfg, DATA)


def without_masks(config: str) -> Config:
    return use_coco_data(Config.fromfile(DETECTOR.parents[1] / config), DATA | dict(masks=False))


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ("dcnv2/mask-rcnn_r50_shapes.py", "FasterRCNN"),
        ("dat/cascade-mask-rcnn_dat-t-v1_fpn_ms-crop-1x_coco.py", "CascadeRCNN"),
        ("detr/detr-dc5_r50_shapes.py", "DETR"),
    ],
)
def test_data_without_masks(config: str, kind: str) -> None:
    cfg = without_masks(config)
    assert cfg.model.type == kind
    assert not [name for name in cfg.model.get("roi_head", {}) if "mask" in name]
    assert not cfg.model.data_preprocessor.get("pad_mask")
    assert cfg.val_evaluator.metric == cfg.test_evaluator.metric == "bbox"
    parts = (cfg.train_dataloader.dataset, cfg.val_dataloader.dataset, cfg.test_dataloader.dataset)
    assert "'with_mask': True" not in str([dict(part) for part in parts])
    init_default_scope("mmdet")
    with torch.device("meta"):
        MODELS.build(cfg.model)


def test_data_without_masks_leave_the_metrics_of_boxes(tmp_path: Path) -> None:
    metrics = ["coco/bbox_mAP", "coco/segm_mAP"]
    boxes = DATA | dict(masks=False)
    assert small_spec(tmp_path, metrics=metrics, data=DATA).metrics == tuple(metrics)
    assert small_spec(tmp_path, metrics=metrics, data=boxes).metrics == ("coco/bbox_mAP",)
    spec = small_spec(tmp_path, metrics=["coco/segm_mAP"])
    with pytest.raises(ValueError, match="metrics: expected one without masks, got coco/segm_mAP"):
        spec.with_data(boxes)


def test_empty_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data: expected the keys root, classes"):
        small_spec(tmp_path, data={})


def test_a_detector_that_needs_masks_refuses_data_without() -> None:
    cfg = Config.fromfile(DETECTOR.parents[1] / "dcnv2/mask-rcnn_r50_shapes.py")
    cfg.model.type = "PointRend"
    with pytest.raises(ValueError, match=r"data: masks: expected a detector .*, got PointRend"):
        use_coco_data(cfg, DATA | dict(masks=False))


def test_costs(detector: Config) -> None:
    small = apply_overrides(
        detector,
        {"model.backbone.base_channels": 4, "model.neck.in_channels": [4, 8, 16, 32]},
    )
    before = config_hash(detector)
    cost, smaller = measure(detector), measure(small, repeats=1)
    assert config_hash(detector) == before  # mmdet's detectors write into theirs
    assert 1e6 < smaller.parameters < cost.parameters < 4e6
    assert 1e8 < smaller.macs < cost.macs < 1e9
    assert cost.latency_ms is None and smaller.latency_ms > 0 and smaller.peak_memory_bytes > 1e5

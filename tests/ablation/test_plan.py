"""Plans: overrides that mean something, other data, costs."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmdet")
from mmengine import Config

from mmdeform.ablation import apply_overrides, config_hash, measure, plan_rows, use_coco_data

from .small import base_config, small_spec

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
    two = {"model.parts": [], "by_base": dict(x={"model.depth": 2}, y={"model.depth": 3})}
    other = dict(by_base=dict(y={"model.depth": 4}, x=None))
    spec = small_spec(tmp_path, base=dict(x="base.py", y="base.py"),
                      axes=dict(d=dict(one=other, two=two)))  # fmt: skip
    for base, depths in (("x", [1, 2]), ("y", [4, 3])):
        rows = plan_rows(spec, base)
        assert [row.config.model.depth for row in rows] == depths
        assert rows[1].config.model.parts == []
    with pytest.raises(ValueError, match="unknown base in 'by_base' of 'a': 'z'"):
        small_spec(tmp_path, axes=dict(d=dict(a=dict(by_base=dict(z={})))))


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
    for data, root in ((None, "data/pets"), (dict(DATA, root="data/cars"), "data/cars")):
        for row in plan_rows(spec, data=data):
            assert row.config.train_dataloader.dataset.data_root == root


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(clases=[]), "data: expected the keys root, classes, train, val"),
        (dict(classes=[]), "data: classes: expected a list of names"),
        (dict(val=dict(images="")), "data: val: expected the keys annotations, images"),
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


def test_costs(detector: Config) -> None:
    small = apply_overrides(
        detector,
        {"model.backbone.base_channels": 4, "model.neck.in_channels": [4, 8, 16, 32]},
    )
    cost, smaller = measure(detector), measure(small, repeats=1)
    assert 1e6 < smaller.parameters < cost.parameters < 4e6
    assert 1e8 < smaller.macs < cost.macs < 1e9
    assert cost.latency_ms is None and smaller.latency_ms > 0 and smaller.peak_memory_bytes > 1e5

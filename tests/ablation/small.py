"""A small ablation of nothing, and its store."""

from pathlib import Path
from typing import Any

from mmengine import Config

from mmdeform.ablation import Spec, Store, plan_rows
from mmdeform.ablation.spec import make_spec

BASE = """
model = dict(type='Fake', depth=1, fails=False, parts=[dict(size=1), dict(size=2)])
train_cfg = dict(by_epoch=True, max_epochs=3, val_interval=1)
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1))
optim_wrapper = dict(optimizer=dict(lr=0.1))
milestone = 2
"""
SPEC: dict[str, Any] = dict(
    name="small",
    base="base.py",
    axes=dict(depth={"one": {}, "two": {"model.depth": 2}}),
    seeds=[0, 1],
    metrics=["coco/bbox_mAP"],
)


def write_base(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "base.py").write_text(BASE)


def small_spec(folder: Path, **changes: Any) -> Spec:
    write_base(folder)
    return make_spec({**SPEC, **changes}, folder)


def small_store(folder: Path, **changes: Any) -> Store:
    spec = small_spec(folder, **changes)
    return Store.create(folder / "work", spec, plan_rows(spec))


def base_config() -> Config:
    return Config.fromstring(BASE, ".py")

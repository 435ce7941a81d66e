"""Any data set in COCO format in place of the one that a config has."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine import Config

KEYS = ("root", "classes", "train", "val")


def use_coco_data(cfg: Config, data: Mapping[str, Any]) -> Config:
    """A copy of a config with another data set in COCO format; pipelines and schedule stay.

    Args:
        cfg (Config): A detector on a ``CocoDataset``.
        data (Mapping): ``root`` (folder), ``classes`` (list of names), ``train`` and ``val``, each
            with ``annotations`` (COCO json) and ``images`` (folder), relative to the root. The
            detector is validated and tested on ``val``.

    Raises:
        ValueError: Something is missing or unknown, or the config has other data.
    """
    if not isinstance(data, Mapping) or set(data) != set(KEYS):
        raise ValueError(f"data: expected the keys {', '.join(KEYS)}, got {data!r}")
    classes = data["classes"]
    if not isinstance(classes, (list, tuple)) or not classes:
        raise ValueError(f"data: classes: expected a list of names, got {classes!r}")
    for split in ("train", "val"):
        if not isinstance(data[split], Mapping) or set(data[split]) != {"annotations", "images"}:
            raise ValueError(
                f"data: {split}: expected the keys annotations, images, got {data[split]!r}"
            )
    cfg = copy.deepcopy(cfg)
    for loader, split in (("train", "train"), ("val", "val"), ("test", "val")):
        dataset = cfg.get(f"{loader}_dataloader", {}).get("dataset", {})
        if dataset.get("type") != "CocoDataset":
            raise ValueError(
                f"data: {loader}_dataloader.dataset: expected a config with a CocoDataset, got "
                f"{dataset.get('type')!r}"
            )
        dataset["data_root"] = data["root"]
        dataset["ann_file"] = data[split]["annotations"]
        dataset["data_prefix"] = dict(img=data[split]["images"])
        dataset["metainfo"] = dict(classes=tuple(classes))
    for evaluator in ("val_evaluator", "test_evaluator"):
        if cfg[evaluator].get("type") != "CocoMetric":
            raise ValueError(f"data: {evaluator}: expected a CocoMetric")
        cfg[evaluator]["ann_file"] = str(Path(data["root"]) / data["val"]["annotations"])
    _set_num_classes(cfg.model, len(classes))
    return cfg


def _set_num_classes(part: Any, count: int) -> None:
    if isinstance(part, Mapping):
        if "num_classes" in part:
            part["num_classes"] = count
        part = part.values()
    elif not isinstance(part, (list, tuple)):
        return
    for child in part:
        _set_num_classes(child, count)

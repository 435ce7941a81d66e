"""Any data set in COCO format in place of the one that a config has."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmengine import Config

KEYS = ("root", "classes", "train", "val")
MASKS = "masks"
WITHOUT_MASKS = {"MaskRCNN": "FasterRCNN", "CascadeRCNN": "CascadeRCNN"}


def check_data(data: Any) -> None:
    """
    Raises:
        ValueError: Something is missing or unknown; see :func:`use_coco_data`.
    """
    if not isinstance(data, Mapping) or set(data) - {MASKS} != set(KEYS):
        raise ValueError(f"data: expected the keys {', '.join(KEYS)} and maybe masks, got {data!r}")
    classes = data["classes"]
    if not isinstance(classes, (list, tuple)) or not classes:
        raise ValueError(f"data: classes: expected a list of names, got {classes!r}")
    for split in ("train", "val"):
        if not isinstance(data[split], Mapping) or set(data[split]) != {"annotations", "images"}:
            raise ValueError(
                f"data: {split}: expected the keys annotations, images, got {data[split]!r}"
            )
    if not isinstance(data.get(MASKS, True), bool):
        raise ValueError(f"data: masks: expected true or false, got {data[MASKS]!r}")


def use_coco_data(cfg: Config, data: Mapping[str, Any]) -> Config:
    """A copy of a config with another data set in COCO format; pipelines and schedule stay.

    Args:
        cfg (Config): A detector on a ``CocoDataset``.
        data (Mapping): ``root`` (folder), ``classes`` (list of names), ``train`` and ``val``, each
            with ``annotations`` (COCO json) and ``images`` (folder), relative to the root. The
            detector is validated and tested on ``val``. ``masks`` is False if objects have boxes
            alone: none are loaded or measured then, and the mask branch goes.

    Raises:
        ValueError: Something is missing or unknown, the config has other data, or its detector does
            not work without masks.
    """
    check_data(data)
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
        dataset["metainfo"] = dict(classes=tuple(data["classes"]))
        if not data.get(MASKS, True):
            _load_no_masks(dataset["pipeline"])
    for evaluator in ("val_evaluator", "test_evaluator"):
        if cfg[evaluator].get("type") != "CocoMetric":
            raise ValueError(f"data: {evaluator}: expected a CocoMetric")
        cfg[evaluator]["ann_file"] = str(Path(data["root"]) / data["val"]["annotations"])
        if not data.get(MASKS, True):
            cfg[evaluator]["metric"] = "bbox"
    _set_num_classes(cfg.model, len(data["classes"]))
    if not data.get(MASKS, True):
        _remove_mask_branch(cfg.model)
    return cfg


def without_masks(metrics: Iterable[str], data: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of a spec's metrics that can be measured on its data."""
    return tuple(name for name in metrics if data.get(MASKS, True) or "segm" not in name)


def _load_no_masks(part: Any) -> None:
    """Of a pipeline, whose transforms may hold others."""
    if isinstance(part, Mapping):
        if part.get("with_mask"):
            part["with_mask"] = False
        part = part.values()
    elif not isinstance(part, (list, tuple)):
        return
    for child in part:
        _load_no_masks(child)


def _remove_mask_branch(model: Any) -> None:
    if model.get("data_preprocessor", {}).get("pad_mask"):
        model["data_preprocessor"]["pad_mask"] = False
    branch = [name for name in model.get("roi_head") or {} if name.startswith("mask_")]
    if branch and model["type"] not in WITHOUT_MASKS:
        raise ValueError(
            f"data: masks: expected a detector that works without them "
            f"({', '.join(WITHOUT_MASKS)}), got {model['type']}"
        )
    for name in branch:
        del model["roi_head"][name]
    if branch:
        model["type"] = WITHOUT_MASKS[model["type"]]


def _set_num_classes(part: Any, count: int) -> None:
    if isinstance(part, Mapping):
        if "num_classes" in part:
            part["num_classes"] = count
        part = part.values()
    elif not isinstance(part, (list, tuple)):
        return
    for child in part:
        _set_num_classes(child, count)

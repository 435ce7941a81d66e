"""Write the table of all models, docs/models.md, from the metafiles and the configs.

    python tools/model_table.py

Figures are those of configs/*/metafile.yml; parameters are counted on models without memory.
"""

import argparse
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.utils import import_modules_from_strings

import mmdeform

ROOT = Path(__file__).resolve().parents[1]
INTRODUCTION = f"""# Models

Written by `python {Path(__file__).relative_to(ROOT)}`.

Figures without a mark come from one run on the CPU, with seed 0, on the generated data set of
shapes or on BCCD. Those with \\* were published elsewhere, for the same model with other operators,
and not reproduced here: the README of each family says by whom. Parameters are counted here, in
millions, with frozen ones and without buffers.
"""


def families(root: Path = ROOT) -> dict[str, list[dict[str, Any]]]:
    """The models that each metafile lists, by the name of its folder."""
    return {
        path.parent.name: yaml.safe_load(path.read_text())["Models"]
        for path in sorted((root / "configs").glob("*/metafile.yml"))
    }


def count_parameters(path: Path) -> str:
    """Parameters of the model of a config, in millions, counted without memory for them."""
    cfg = Config.fromfile(path, import_custom_modules=False)
    if cfg.default_scope != "mmdet":
        return "-"  # classifiers are built by mmpretrain, which is not among the requirements
    import_modules_from_strings(**cfg.custom_imports)
    init_default_scope(cfg.default_scope)
    # Swin reads the values of its linspace.
    linspace = functools.partial(torch.linspace, device="cpu")
    with torch.device("meta"), patch.object(torch, "linspace", linspace):
        model = MODELS.build(cfg.model)
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}"


def metrics(model: dict[str, Any]) -> str:
    """All figures of a model in one cell."""
    cells = []
    for result in model.get("Results", []):
        mark = "" if result["Dataset"] in ("shapes", "BCCD") else "\\*"
        cells += [f"{name} {value}{mark}" for name, value in result["Metrics"].items()]
    return ", ".join(cells) or "-"


def data_of(name: str) -> str:
    """The data set that a config's name ends with."""
    names = {"coco": "COCO", "voc": "VOC", "voc0712": "VOC 07+12", "in1k": "ImageNet-1k"}
    end = re.split("[-_]", name)[-1]
    return names.get(end, end)


def lines(count: Callable[[Path], str] = count_parameters, root: Path = ROOT) -> Iterator[str]:
    """The document, line by line; ``count`` gives the parameters of a config's model."""
    yield from INTRODUCTION.splitlines()
    for family, models in families(root).items():
        yield from ("", f"## [{family}](../configs/{family})", "")
        yield "| model | data | epochs | parameters | figures |"
        yield "|---|---|---|---|---|"
        for model in models:
            yield (
                f"| [{model['Name']}](../{model['Config']}) | {data_of(model['Name'])} | "
                f"{model['Metadata']['Epochs']} | {count(root / model['Config'])} | "
                f"{metrics(model)} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ROOT / "docs/models.md"
    parser.add_argument("--out", type=Path, default=default, help="default: docs/models.md")
    args = parser.parse_args()
    print(f"mmdeform {mmdeform.__version__}: building every model, which takes some minutes")
    args.out.write_text("\n".join(lines()) + "\n")


if __name__ == "__main__":
    main()

"""Write weights of DAT as the authors' code loads them.

    python tools/convert_dat.py work_dirs/dat/epoch_36.pth official.pth --config CONFIG
    python tools/convert_dat.py backbone.pth official.pth --arch tiny --version v1

CHECKPOINT is a detector, a backbone or a classifier: of mmengine's runner, or a bare state dict.
The result is for https://github.com/LeapLabTHU/DAT ({'model': ...}, if there is a classifier) or
https://github.com/LeapLabTHU/DAT-Detection ({'state_dict': ...}). For v1 detectors there is no
published code. The other direction needs no tool: init_cfg=dict(type='Pretrained', checkpoint=...)
loads the authors' files.
"""

import argparse
import pickle
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor

from mmdeform.models.backbones import DAT
from mmdeform.models.backbones.dat.arch import ARCHS
from mmdeform.models.backbones.dat.published import LAYOUTS, published_state_dict
from mmdeform.models.backbones.loading import load_exactly
from mmdeform.models.backbones.reading import find_state_dict, read_checkpoint

BACKBONE = "backbone."
# A classifier of mmpretrain: the norm of the last map and a linear head.
MMPRETRAIN = {
    "backbone.norms.3.norm.weight": "backbone.cls_norm.norm.weight",
    "backbone.norms.3.norm.bias": "backbone.cls_norm.norm.bias",
    "head.fc.weight": "backbone.cls_head.weight",
    "head.fc.bias": "backbone.cls_head.bias",
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="what to convert")
    parser.add_argument("out", type=Path, help="file to write")
    model = parser.add_argument_group(
        "the model, by its config, or by the name of its architecture"
    )
    model.add_argument("--config", type=Path, help="config whose model or backbone it is")
    model.add_argument("--arch", choices=list(ARCHS["v1"]))
    model.add_argument("--version", choices=list(ARCHS))
    model.add_argument("--img-size", type=int, help="default: the config's, or 224")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="default: classification if the checkpoint has a classifier, else detection",
    )
    return parser


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of :class:`DAT`, without those that do not change weights of the backbone."""
    if args.config is None:
        options = dict(arch=args.arch, version=args.version)
    else:
        model = Config.fromfile(args.config, import_custom_modules=False).model
        options = dict(model.get("backbone", model))
        kind = options.pop("type", None)
        if kind not in ("DAT", "mmdeform.DAT", DAT):
            raise ValueError(f"{args.config}: expected a backbone mmdeform.DAT, got {kind!r}")
    if args.img_size:
        options["img_size"] = args.img_size
    for name in ("init_cfg", "num_classes", "out_indices", "frozen_stages", "_scope_"):
        options.pop(name, None)
    return options


def load(options: dict[str, Any], state: dict[str, Tensor], name: str) -> DAT:
    """A model that has exactly these weights; classes and maps are those that they are for."""
    if "cls_head.weight" in state:
        options["num_classes"] = len(state["cls_head.weight"])
    else:
        indices = {int(key.split(".")[1]) for key in state if key.startswith("norms.")}
        if not indices:
            raise ValueError(
                f"{name}: expected norms.* of a backbone or cls_head.* of a classifier"
            )
        options["out_indices"] = sorted(indices)
    model = DAT(**options)
    load_exactly(model, state, name)
    return model


def convert(args: argparse.Namespace) -> None:
    """Reads, converts and writes."""
    name = str(args.checkpoint)
    state = dict(find_state_dict(read_checkpoint(args.checkpoint), name))
    if not any(key.startswith(BACKBONE) for key in state):
        state = {BACKBONE + key: value for key, value in state.items()}
    if "head.fc.weight" in state:
        state = {MMPRETRAIN.get(key, key): value for key, value in state.items()}
    layout = args.layout
    if layout is None:
        layout = "classification" if "backbone.cls_head.weight" in state else "detection"

    own = {key[len(BACKBONE) :]: state[key] for key in state if key.startswith(BACKBONE)}
    others = {key: state[key] for key in state if not key.startswith(BACKBONE)}
    options = options_of(args)
    model = load(options, own, name)
    converted = published_state_dict(model, layout, options.get("img_size", 224))
    if layout == "classification":
        result: dict[str, Any] = {"model": converted}
        left_out = [key for key in (*own, *others) if key.startswith("norms.") or key in others]
    else:
        converted = {BACKBONE + key: value for key, value in converted.items()} | others
        result = {"state_dict": converted, "meta": {}}
        left_out = [key for key in own if key.startswith("cls_")]
    torch.save(result, args.out)
    print(f"{args.out}: {len(converted)} entries in the layout of {layout}")
    if left_out:
        print(f"left out, because this layout has no place for them: {', '.join(left_out)}")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if (args.config is None) == (args.arch is None) or bool(args.arch) != bool(args.version):
        parser.error("expected either --config, or --arch and --version")
    if args.out.resolve() == args.checkpoint.resolve():
        parser.error(f"out: expected another file than the checkpoint, {args.checkpoint}")
    try:
        convert(args)
    except (ValueError, OSError, pickle.UnpicklingError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

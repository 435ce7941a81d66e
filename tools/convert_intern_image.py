"""Rewrite weights of InternImage: for other code, or for FlashInternImage.

    python tools/convert_intern_image.py internimage_t_1k_224.pth flash.pth --flash
    python tools/convert_intern_image.py work_dirs/intern/epoch_12.pth detector.pth
    python tools/convert_intern_image.py epoch_12.pth classifier.pth --layout classification

CHECKPOINT is a detector, a backbone or a classifier, of InternImage or FlashInternImage: published,
of mmengine's runner, or a bare state dict. Names are the same everywhere, so the result is for this
package and for the authors' code: {'state_dict': ...} with names that begin with 'backbone.', and
all of a detector, or {'model': ...} without anything else. Optimizers and the like are left out.

--flash gives FlashInternImage the weights of InternImage. Not all of them have a counterpart: it
prints what is kept exactly, what approximately, what not, and the config of the resulting backbone.
"""

import argparse
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdeform.models.backbones import FlashInternImage, InternImage
from mmdeform.models.backbones.intern_image.arch import FLASH_INTERN_IMAGE, INTERN_IMAGE
from mmdeform.models.backbones.intern_image.conversion import (
    arguments_of,
    published_size,
    to_flash,
)
from mmdeform.models.backbones.intern_image.intern_image import CLASSIFIER, CONTAINERS
from mmdeform.models.backbones.loading import load_exactly
from mmdeform.models.backbones.reading import find_state_dict, read_checkpoint

BACKBONE = "backbone."
LAYOUTS = ("detection", "classification")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="what to convert")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--flash", action="store_true", help="for FlashInternImage")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="default: classification if the checkpoint has a classifier, else detection",
    )
    return parser


def read(args: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of the backbone, or of the classifier, and those of the rest of a detector."""
    name = str(args.checkpoint)
    state = find_state_dict(read_checkpoint(args.checkpoint), name, CONTAINERS)
    if not any(key.startswith(BACKBONE) for key in state):
        return dict(state), {}
    own = {key[len(BACKBONE) :]: state[key] for key in state if key.startswith(BACKBONE)}
    return own, {key: state[key] for key in state if not key.startswith(BACKBONE)}


def describe(kind: type[InternImage], arguments: dict[str, Any]) -> str:
    """The backbone in a config: its size, and how it differs from what is published."""
    arch = published_size(kind, arguments) or "tiny"
    published = dataclasses.asdict(kind.archs[arch])
    items = [f"type='mmdeform.{kind.__name__}'", f"arch={arch!r}"]
    items += [
        f"{key}={arguments[key]!r}"
        for key, value in published.items()
        if key in arguments and arguments[key] != value
    ]
    return f"backbone=dict({', '.join(items)})"


def make_flash(
    state: dict[str, Tensor], arguments: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """InternImage's weights and arguments for FlashInternImage; prints what became of them."""
    size = published_size(InternImage, arguments)
    # Depthwise convolutions where FlashInternImage has them; there is none of this size: kept.
    depthwise = size not in FLASH_INTERN_IMAGE or FLASH_INTERN_IMAGE[size].dw_kernel_size
    weights = to_flash(state, bool(depthwise))
    arguments = dict(arguments)
    arguments["dw_kernel_size"] = (arguments["dw_kernel_size"] or 3) if depthwise else None
    if size is None:
        print("no published size: give the backbone the offset_scale of the model as well")
    else:
        arguments["offset_scale"] = INTERN_IMAGE[size].offset_scale
    print(f"exactly as in InternImage: {len(weights.exact)} entries")
    print(
        f"approximately, and to be trained: {len(weights.approximate)} entries offset_mask.*; they "
        "predict at every pixel what InternImage predicts for average features"
    )
    if weights.left_out:
        print(f"left out, without a counterpart: {len(weights.left_out)} entries dw_conv.0.*")
    return weights.state, arguments


def convert(args: argparse.Namespace) -> None:
    """Reads, converts and writes."""
    name = str(args.checkpoint)
    own, others = read(args)
    try:
        kind, arguments = arguments_of(own)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    with torch.device("meta"):
        model = kind(**arguments)
    load_exactly(model, own, name, assign=True)
    if args.flash:
        if kind is FlashInternImage:
            raise ValueError(f"{name}: expected weights of InternImage, got FlashInternImage's")
        kind, (own, arguments) = FlashInternImage, make_flash(own, arguments)

    layout = args.layout or ("classification" if arguments["num_classes"] else "detection")
    head = [key for key in own if key.partition(".")[0] in CLASSIFIER]
    if layout == "classification":
        result: dict[str, Any] = {"model": own}
        left_out = list(others)
    else:
        backbone = {BACKBONE + key: own[key] for key in own if key not in head}
        result = {"state_dict": backbone | others, "meta": {}}
        left_out = head
    torch.save(result, args.out)
    entries = len(next(iter(result.values())))
    print(f"{args.out}: {entries} entries in the layout of {layout}")
    if left_out:
        print(f"left out, because this layout has no place for them: {', '.join(left_out)}")
    print(f"model: {describe(kind, arguments)}")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.out.resolve() == args.checkpoint.resolve():
        parser.error(f"out: expected another file than the checkpoint, {args.checkpoint}")
    try:
        convert(args)
    except (ValueError, OSError, pickle.UnpicklingError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

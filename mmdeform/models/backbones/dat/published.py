"""The other direction of :mod:`.checkpoint`: state dicts that the authors' code loads."""

import re

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair

from .dat import DAT
from .window_attention import ShiftedWindowAttention, WindowAttention

__all__ = ["LAYOUTS", "published_state_dict"]

LAYOUTS = ("classification", "detection")


def published_state_dict(
    model: DAT, layout: str, img_size: int | tuple[int, int] = 224
) -> dict[str, Tensor]:
    """The entries of a model as https://github.com/LeapLabTHU/DAT or DAT-Detection names them.

    Constants that their windows store are added, so that they load it strictly.

    Args:
        model: The weights.
        layout: 'classification' or 'detection'. The first has no norms of single stages, the second
            no classifier.
        img_size: Size of images, or (height, width), for which masks of shifted windows are made;
            their classifiers take no other. Default: 224.

    Raises:
        ValueError: The layout is unknown, or maps of this size are not made of whole windows.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
    classification = layout == "classification"
    state = {}
    for key, value in model.state_dict().items():
        if key.startswith("norms." if classification else "cls_"):
            continue
        if not classification:
            key = re.sub(r"(layer_scales\.\d+)\.weight$", r"\1.gamma", key)
        state[key] = value
    for index, stage in enumerate(model.stages):
        size = [length // 4 // 2**index for length in _pair(img_size)]
        for name, module in stage.named_modules(prefix=f"stages.{index}"):
            if isinstance(module, WindowAttention):
                state[f"{name}.relative_position_index"] = module.relative_position_index
            if isinstance(module, ShiftedWindowAttention) and classification:
                state[f"{name}.attn_mask"] = _attention_mask(name, module, size)
    return state


def _attention_mask(name: str, module: ShiftedWindowAttention, size: list[int]) -> Tensor:
    """(windows, N, N) for maps of this size."""
    if any(length % module.window_size for length in size):
        raise ValueError(
            f"img_size: expected one that gives {name} a map made of whole windows of "
            f"{module.window_size} pixels, as the authors' classifiers need, got a map of "
            f"{size[0]} x {size[1]}"
        )
    return module.attention_mask(torch.empty(1, *size, 1)).squeeze(1)

"""Finds the deformable attentions of a DAT.

name = find_block(deformable_blocks(backbone), stage=3)
with record(backbone, name) as recording:
    backbone(images)
keys = recording[name]  # a KeysCall: its keys and their attention
"""

import re
from collections.abc import Mapping, Sequence

from torch import nn

from mmdeform.layers.dat_attn import DeformableAttention2d

__all__ = ["deformable_blocks", "find_block"]


def deformable_blocks(model: nn.Module) -> dict[int, list[str]]:
    """Names of the deformable attentions of a DAT by stage.

    Args:
        model: ``mmdeform.DAT``, or a model that contains one.

    Returns:
        Names in the order in which they run, for each stage, from 1 to 4, that has any.

    Raises:
        ValueError: If there are none, or more than one DAT.
    """
    blocks: dict[int, list[str]] = {}
    prefixes = set()
    for name, module in model.named_modules():
        place = re.fullmatch(r"(.*\.)?stages\.(\d+)\.attns\.\d+", name)
        if isinstance(module, DeformableAttention2d) and place:
            prefixes.add(place[1])
            blocks.setdefault(int(place[2]) + 1, []).append(name)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no block with deformable attention; expected "
            "type='mmdeform.DAT' with a D in its stage_specs"
        )
    if len(prefixes) > 1:
        raise ValueError(
            f"{type(model).__name__} has several DATs, {', '.join(sorted(prefixes))}; give one"
        )
    return blocks


def find_block(blocks: Mapping[int, Sequence[str]], stage: int, block: int = -1) -> str:
    """Name of one of the deformable attentions.

    Args:
        blocks: What :func:`deformable_blocks` returns.
        stage: Stage, from 1 to 4.
        block: Which of the deformable attentions of this stage, from 0, or from the end if
            negative. Default: -1, the last.

    Raises:
        ValueError: If there is no such attention; the message lists those that exist.
    """
    names = blocks.get(stage, ())
    if -len(names) <= block < len(names):
        return names[block]
    there = ", ".join(f"{len(names)} in stage {stage}" for stage, names in blocks.items())
    if not names:
        raise ValueError(f"stage {stage} has no deformable block; there are {there}")
    raise ValueError(
        f"block must be between {-len(names)} and {len(names) - 1} in stage {stage}, but got "
        f"{block}; deformable blocks: {there}"
    )

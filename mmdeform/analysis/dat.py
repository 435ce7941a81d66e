"""Where the keys of deformable attention lie in an image, and how much queries attend to them.

    name = find_block(deformable_blocks(backbone), stage=3)
    with record_keys(backbone, [name]) as layers:
        backbone(images)
    keys = layers[name]
    keys.points, keys.attention([keys.query_at(80, 60)])

Positions in an image are (x, y) in pixels; pixel i has its centre at i, as in the operators.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmdeform.layers.dat_attn import DeformableAttention2d

__all__ = ["LayerKeys", "deformable_blocks", "find_block", "record_keys"]

# Weights that are computed at a time: 16 MB of fp32, a few times that with what they are made of.
MAX_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class LayerKeys:
    """Keys of one deformable attention in one forward pass.

    Attributes:
        name: Name of the layer in its model.
        layer: The layer.
        input: What it was called with, shape (N, C, H, W); each of its pixels is a query.
        points: The keys (x, y) in pixels of the image, shape (N, G, Ns, 2) for G groups.
        reference: The same without offsets.
        stride: Distance (x, y) of neighbouring queries in pixels of the image.
        first: Centre (x, y) of the first query in the image.
    """

    name: str
    layer: DeformableAttention2d
    input: Tensor
    points: Tensor
    reference: Tensor
    stride: tuple[float, float]
    first: tuple[float, float]

    def query_at(self, x: float, y: float) -> int:
        """Index of the query nearest to a position in the image, counted along rows."""
        height, width = self.input.shape[2:]
        column = round((x - self.first[0]) / self.stride[0])
        row = round((y - self.first[1]) / self.stride[1])
        return min(max(row, 0), height - 1) * width + min(max(column, 0), width - 1)

    def position_of(self, query: int) -> tuple[float, float]:
        """Centre (x, y) of a query in the image."""
        row, column = divmod(query, self.input.shape[3])
        return (
            self.first[0] + column * self.stride[0],
            self.first[1] + row * self.stride[1],
        )

    def queries_within(self, width: float, height: float) -> list[int]:
        """Indices of the queries whose centres lie in the first pixels of the image.

        Args:
            width, height: Size of what is not padding, pixels.
        """
        return [
            query
            for query in range(self.input.shape[2:].numel())
            if all(
                p < s - 0.5 for p, s in zip(self.position_of(query), (width, height), strict=True)
            )
        ]

    def attention(self, queries: Sequence[int], image: int = 0) -> Tensor:
        """Attention of some queries, averaged over them.

        Args:
            queries: Indices of queries; many are computed in chunks of bounded size.
            image: Index in the batch. Default: 0.

        Returns:
            Weights of the keys for each head, shape (M, Ns), which sum to 1 over the keys. Head m
            belongs to group ``m // (M // G)``.

        Raises:
            ValueError: If ``queries`` is empty.
        """
        if not len(queries):
            raise ValueError("queries must hold at least one index, but is empty")
        heads, count = self.layer.num_heads, self.points.shape[2]
        indices = torch.as_tensor(queries, device=self.input.device)
        total = self.points.new_zeros(heads, count)
        with torch.no_grad():
            for chunk in indices.split(max(1, MAX_WEIGHTS // (heads * count))):
                weights = self.layer.attention(self.input[image : image + 1], chunk)
                total += weights[0].to(total.dtype).sum(1)
        return total / len(indices)


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


@contextmanager
def record_keys(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, LayerKeys]]:
    """Records where deformable attentions of ``model`` place their keys while the block runs.

    Args:
        model: ``mmdeform.DAT``, or a model that contains one, which is called in the block.
            Positions refer to the images that the DAT gets.
        names: Names of layers; see :func:`find_block`.

    Yields:
        Keys of each layer by its name; of a layer that ran more than once the last time.
    """
    record: dict[str, LayerKeys] = {}

    def see(name: str, layer: DeformableAttention2d, args: tuple[Any, ...]) -> None:
        record[name] = _keys(model, name, layer, args[0].detach())

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda layer, args, name=name: see(name, layer, args)
        )
        for name in names
    ]
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _keys(model: nn.Module, name: str, layer: DeformableAttention2d, input: Tensor) -> LayerKeys:
    prefix, stage = name.split("stages.")[0], int(name.split("stages.")[1].split(".")[0])
    backbone = model.get_submodule(prefix.removesuffix("."))
    stride, first = _pixel_grid([backbone.patch_proj, *backbone.down_projs[:stage]])
    # -1 and 1 are the centres of the first and the last pixel of the map.
    size = torch.tensor(input.shape[2:]).flip(0)  # width, height
    half = ((size - 1) / 2).to(input)

    def in_image(positions: Tensor) -> Tensor:
        pixels = (positions.flip(-1).flatten(2, 3) + 1) * half
        return pixels * pixels.new_tensor(stride) + pixels.new_tensor(first)

    positions, reference = layer.predict_positions(input)
    return LayerKeys(name, layer, input, in_image(positions), in_image(reference), stride, first)


def _pixel_grid(
    convolutions: Sequence[nn.Module],
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Distance (x, y) of the pixels of a map behind these modules, and centre of its first pixel.

    The centre of a pixel is that of the window that it was computed from. Patches of 2x2 or 4x4
    pixels have it between pixels of the image, odd kernels padded by half of them on one.
    """
    stride, first = [1.0, 1.0], [0.0, 0.0]
    for module in convolutions:
        for conv in module.modules():
            if isinstance(conv, nn.Conv2d):
                for axis in (0, 1):  # x, y; convolutions have (y, x)
                    middle = (conv.kernel_size[1 - axis] - 1) / 2 - conv.padding[1 - axis]
                    first[axis] += stride[axis] * middle
                    stride[axis] *= conv.stride[1 - axis]
    return (stride[0], stride[1]), (first[0], first[1])

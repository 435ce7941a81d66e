"""Nodes: what in a network responds to an image, as a function of images that gives vectors."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..recording import GridTracer

__all__ = ["Node", "feature_node"]

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Node:
    """Something in a network whose response to an image is looked at.

    Attributes:
        name: What it is, in words.
        model: The network.
        respond: Maps images, shape (N, C, H, W), to the node's response to each of them, shape
            (N, K). Autograd sees it.
        position: Where it is in the images, (x, y) in pixels whose pixel i has its centre at i.
        box: Its box (x1, y1, x2, y2) in pixels of the images, where pixel i reaches from i to
            i + 1; None where it has none.
    """

    name: str
    model: nn.Module
    respond: Callable[[Tensor], Tensor]
    position: tuple[float, float]
    box: Box | None = None


class Reached(Exception):
    """Ends a forward pass at the last output that is needed."""


def outputs_of(
    run: Callable[[Tensor], Any], module: nn.Module, images: Tensor, count: int | None
) -> list[Tensor]:
    """The first tensors that a module returns while a network runs, which ends with the last.

    Args:
        run: Sends images through the network.
        module: Part of the network. Tensors of a tuple that it returns count one by one, those of
            several calls one call after the other.
        images: Shape (N, C, H, W).
        count: Number of tensors. None: all of them.

    Returns:
        As many tensors, or fewer if there are no more.
    """
    found: list[Tensor] = []

    def see(module: nn.Module, args: tuple, output: Any) -> None:
        found.extend(_tensors(output))
        if count is not None and len(found) >= count:
            raise Reached

    with ended_by(module.register_forward_hook(see)):
        run(images)
    return found[:count]


@contextmanager
def ended_by(handle: RemovableHandle) -> Iterator[None]:
    """Lets a hook end a forward pass by :class:`Reached`; removes the hook in any case."""
    try:
        yield
    except Reached:
        pass
    finally:
        handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
    elif isinstance(output, Iterable) and not isinstance(output, str):
        for part in output:
            yield from _tensors(part)


def find_module(model: nn.Module, name: str) -> nn.Module:
    """A module by its name.

    Raises:
        ValueError: There is none; the message lists what there is at the first unknown part.
    """
    found, path = model, []
    for part in name.split("."):
        children = dict(found.named_children())
        if part not in children:
            where = ".".join(path) or type(model).__name__
            there = ", ".join(children) or "none"
            raise ValueError(f"{where} has no module {part!r} as in {name!r}; it has {there}")
        found = children[part]
        path.append(part)
    return found


def feature_node(
    model: nn.Module,
    images: Tensor,
    layer: str,
    x: float,
    y: float,
    index: int = 0,
    run: Callable[[Tensor], Any] | None = None,
) -> Node:
    """One pixel of a feature map; its response are its channels.

    Args:
        model: The network.
        images: Images such as the node will respond to, shape (N, C, H, W); one forward pass with
            the first of them finds where the pixels of the map lie.
        layer: Name of the module that returns the map, (N, K, h, w).
        x, y: Position in the images, pixels; the pixel of the map nearest to it is the node.
        index: Which of its outputs: tensors of a tuple count one by one, such as the levels of a
            neck, those of several calls one call after the other; from the last if negative.
            Default: 0, the first.
        run: Sends images through the network. Default: ``model``.

    Raises:
        ValueError: There is no such module or output, it is no map, or the position is outside of
            the images.
    """
    module, run = find_module(model, layer), run or model
    _check_inside(images, x, y)
    tracer = GridTracer()
    with torch.no_grad(), tracer.attached(model):
        found = outputs_of(run, module, images[:1], None if index < 0 else index + 1)
    asked = index
    if index < 0:
        index += len(found)
    if not 0 <= index < len(found):
        raise ValueError(f"{layer} returned {len(found)} tensors, so that it has no output {asked}")
    shape = found[index].shape
    if len(shape) != 4 or shape[0] != 1:
        raise ValueError(
            f"output {index} of {layer} must be a map of shape (N, K, h, w), got shape "
            f"{tuple(shape)} for one image"
        )
    height, width = shape[2:]
    grid = tracer.grid_of((width, height))
    nearest = grid.to_map(torch.tensor([x, y], dtype=torch.float64)).round()
    column, row = (
        int(nearest[axis].clamp(0, size - 1)) for axis, size in enumerate((width, height))
    )

    def respond(images: Tensor) -> Tensor:
        return outputs_of(run, module, images, index + 1)[index][:, :, row, column]

    center = grid.to_image(torch.tensor([column, row], dtype=torch.float64))
    name = f"pixel ({column}, {row}) of {layer}" + (f", output {index}" if index else "")
    return Node(name, model, respond, (float(center[0]), float(center[1])))


def _check_inside(images: Tensor, x: float, y: float) -> None:
    height, width = images.shape[2:]
    if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
        raise ValueError(
            f"the position must lie in the images, which are {width} pixels wide and {height} "
            f"high, got ({x:g}, {y:g})"
        )


def check_image(images: Tensor) -> None:
    """Raises ValueError unless there is exactly one image."""
    if images.dim() != 4 or len(images) != 1:
        raise ValueError(f"images: expected one image (1, C, H, W), got {tuple(images.shape)}")


def centre_of(box: Sequence[float]) -> tuple[float, float]:
    """The centre of a box in pixels whose pixel i has its centre at i."""
    return ((box[0] + box[2]) / 2 - 0.5, (box[1] + box[3]) / 2 - 0.5)

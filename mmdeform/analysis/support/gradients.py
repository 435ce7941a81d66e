"""How a node's response depends on the pixels of the image.

A response is a vector. Its gradient with respect to something that moves, a pixel or a sampling
location, is a matrix; what is shown is the root of the sum of its squares. Each random combination
of the entries of the response costs one backward pass, and the mean of their squares is that sum on
average; where there are fewer entries than that, each is differentiated by itself, exactly.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .nodes import Node, check_image

__all__ = ["effective_receptive_field", "gradient_norms", "output_gradients"]

Progress = Callable[[int, int], None]  # steps done, steps in all


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Lets autograd see a network in evaluation mode; leaves it as it was.

    Activation checkpointing (``with_cp``), which would run layers twice, is off meanwhile.

    Raises:
        ValueError: The network is in training mode, where images influence each other and dropout
            is random.
    """
    if model.training:
        raise ValueError(f"{type(model).__name__} must be in evaluation mode: call model.eval()")
    checkpointed = [module for module in model.modules() if getattr(module, "with_cp", False)]
    try:
        for module in checkpointed:
            module.with_cp = False
        with torch.enable_grad():
            yield
    finally:
        for module in checkpointed:
            module.with_cp = True


def directions(size: int, projections: int, like: Tensor) -> Tensor:
    """Combinations of the entries of a vector, the sum of whose squares is that of the entries.

    Args:
        size: Entries of the vector.
        projections: Combinations; at least ``size`` of them make the sum exact.
        like: Gives dtype and device.

    Returns:
        The unit vectors, or, where they are more than ``projections``, random signs scaled by
        1 / sqrt(projections), always the same, shape (min(size, projections), size).

    Raises:
        ValueError: ``projections`` is not positive.
    """
    if projections < 1:
        raise ValueError(f"projections must be at least 1, got {projections}")
    if size <= projections:
        return torch.eye(size).to(like)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (projections, size), generator=generator) * 2 - 1
    return signs.to(like) / projections**0.5


def effective_receptive_field(
    node: Node, images: Tensor, projections: int = 16, progress: Progress | None = None
) -> Tensor:
    """The gradient of a node's response with respect to the intensities of each pixel.

    Of a response of many entries, the root of the sum of the squares of its gradient over entries
    and colour channels, estimated; see the top of this file.

    Args:
        node: See :class:`Node`.
        images: One image as the network gets it, normalised, shape (1, C, H, W).
        projections: Backward passes. Default: 16.
        progress: Called with the backward passes done and all of them. Default: None.

    Returns:
        Response per unit of the normalised image, shape (H, W).

    Raises:
        ValueError: The network is in training mode, or there are several images.

    Source: Zhu et al., "Deformable ConvNets v2" (2018); Luo et al., "Understanding the Effective
    Receptive Field in Deep Convolutional Neural Networks" (2016).
    """
    return gradient_norms(node, images, projections, progress)


def output_gradients(node: Node, images: Tensor, progress: Progress | None = None) -> Tensor:
    """The gradient of each entry of a node's response with respect to each pixel.

    For the outputs of a query see :func:`query_outputs`: the norms of the gradients of x, y, w, h
    and c, as in Deformable DETR. As in training none goes through boxes that a decoder layer hands
    to the next one detached.

    Args:
        node, images, progress: As of :func:`effective_receptive_field`.

    Returns:
        Norms over the colour channels, shape (K, H, W).

    Source: Zhu et al., "Deformable DETR" (2020), https://arxiv.org/abs/2010.04159.
    """
    rows: list[Tensor] = []
    for gradients in response_gradients(node, images, None, progress=progress):
        rows.append(gradients[0][0].norm(dim=0))
    return torch.stack(rows)


def gradient_norms(
    node: Node, images: Tensor, projections: int, progress: Progress | None = None
) -> Tensor:
    """See :func:`effective_receptive_field`."""
    total = images.new_zeros(images.shape[2:])
    for gradients in response_gradients(node, images, projections, progress=progress):
        total += gradients[0][0].square().sum(0)
    return total.sqrt()


def response_gradients(
    node: Node,
    images: Tensor,
    projections: int | None,
    more: Callable[[], Sequence[Any]] = tuple,
    progress: Progress | None = None,
) -> Iterator[tuple[Tensor, ...]]:
    """Runs the node once, then backward for each combination of the entries of its response.

    Args:
        node, images: As of :func:`effective_receptive_field`.
        projections: See :func:`directions`. None: every entry by itself.
        more: Asked after the forward pass for tensors or edges of the graph whose gradients are
            wanted as well.
        progress: Called after each backward pass.

    Yields:
        Gradients of the image, shape (1, C, H, W), and of the others, zero or None for those which
        the response does not depend on.
    """
    check_image(images)
    with differentiable(node.model):
        images = images.detach().clone().requires_grad_()
        response = node.respond(images)[0]
        if not response.requires_grad:
            raise ValueError(f"the response, {node.name}, does not depend on the image")
        count = len(response) if projections is None else projections
        combinations = directions(len(response), count, response)
        inputs = [images, *more()]
        for done, direction in enumerate(combinations, 1):
            gradients = torch.autograd.grad(
                response,
                inputs,
                direction,
                retain_graph=done < len(combinations),
                allow_unused=True,
            )
            yield (
                torch.zeros_like(images) if gradients[0] is None else gradients[0],
                *gradients[1:],
            )
            if progress:
                progress(done, len(combinations))

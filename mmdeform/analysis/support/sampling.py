"""How a node's response depends on where the deformable layers before it sample."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.autograd.graph import Node as GraphNode
from torch.utils._pytree import tree_map_only

from mmdeform.layers.sampling import call_arguments, deformable_layers

from ..recording import LayerCall, record
from .gradients import Progress, response_gradients
from .nodes import Node
from .operators import coordinate_input, location_gradient, operators_of

__all__ = ["LocationGradient", "effective_sampling"]


@dataclass(frozen=True)
class LocationGradient:
    """How much a response depends on the sampling locations of one call of a layer.

    Attributes:
        call: What the layer sampled, in pixels of the image.
        norms: Response per pixel of the image by which a sample moves, shape of ``call.locations``
            without the last 2.
    """

    call: LayerCall
    norms: Tensor


def effective_sampling(
    node: Node,
    images: Tensor,
    layers: str | Sequence[str] = "**",
    projections: int = 16,
    progress: Progress | None = None,
) -> list[LocationGradient]:
    """The gradient of a node's response with respect to every sampling location before it.

    Effective sampling locations of convolutions and attention, and effective bin locations of RoI
    pooling, over stacked layers: a sample of an early layer counts by all that later layers make of
    it, where they sample included. A layer with zero offsets has gradients as well. For RoI pooling
    a bin moves with all its samples; for DAT the gradient is that of the sampled keys, without that
    of position biases.

    Args:
        node: See :class:`Node`.
        images: One image as the network gets it, shape (1, C, H, W).
        layers: A pattern or several of names of layers; see
            :func:`mmdeform.layers.sampling.deformable_layers`. Default: all deformable layers.
        projections: Backward passes; see :func:`effective_receptive_field`. Default: 16.
        progress: Called with the backward passes done and all of them. Default: None.

    Returns:
        Calls that the response depends on, in the order in which they ran. None: no deformable
        layer runs before the node.

    Raises:
        ValueError: The network has no deformable layer, or a pattern matches none; or as
            :func:`effective_receptive_field`.

    Source: Zhu et al., "Deformable ConvNets v2" (2018), https://arxiv.org/abs/1811.11168.
    """
    squares: list[Tensor | None] = []
    with record(node.model, layers) as recording, _watched(node.model, layers) as watched:
        edges = lambda: [edge for operators in watched for edge in operators.edges]  # noqa: E731
        for _ in response_gradients(node, images, projections, edges, progress):
            calls = list(zip(recording, watched, strict=True))
            squares = squares or [None] * len(calls)
            for index, (call, operators) in enumerate(calls):
                gradients = operators.take()
                if gradients is not None and call.locations.numel():
                    gradient = location_gradient(call.layer, call, gradients)
                    total = gradient.square().sum(-1)
                    squares[index] = total + (0 if squares[index] is None else squares[index])
    return [
        LocationGradient(call, total.sqrt())
        for call, total in zip(recording, squares, strict=True)
        if total is not None
    ]


@dataclass
class _Operators:
    """The operators of one call of a layer, and the gradients that they gave their coordinates."""

    nodes: list[GraphNode]
    edges: list[GradientEdge] = field(default_factory=list)
    gradients: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for index, node in enumerate(self.nodes):
            parent, number = node.next_functions[coordinate_input(node)]
            if parent is not None:
                # Backward has to go to where coordinates come from, also if no image is there.
                self.edges.append(GradientEdge(parent, number))
                node.register_hook(lambda inputs, outputs, index=index: self._see(index, inputs))

    def _see(self, index: int, inputs: tuple[Tensor | None, ...]) -> None:
        gradient = inputs[coordinate_input(self.nodes[index])]
        if gradient is not None:
            self.gradients[index] = gradient.detach()

    def take(self) -> list[Tensor] | None:
        """Gradients of the last backward pass, in the order of the operators, if it came by."""
        if len(self.gradients) < len(self.nodes) or not self.nodes:
            self.gradients.clear()
            return None
        gradients = [self.gradients[index] for index in range(len(self.nodes))]
        self.gradients.clear()
        return gradients


@contextmanager
def _watched(model: nn.Module, layers: str | Sequence[str]) -> Iterator[list[_Operators]]:
    """Finds the operators of each call of a deformable layer, in the order of the calls."""
    found: list[_Operators] = []

    def before(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        return tree_map_only(Tensor, _differentiable, (args, kwargs))

    def after(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        found.append(_Operators(operators_of(output, call_arguments(layer, args, kwargs).values())))

    handles = []
    for layer in deformable_layers(model, layers).values():
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _differentiable(tensor: Tensor) -> Tensor:
    """Brings inputs that depend on nothing trainable, as in a frozen network, into the graph."""
    if tensor.requires_grad or not tensor.is_floating_point():
        return tensor
    return tensor.detach().requires_grad_()

"""What a benchmark is made of: an operator, its cases, and the peers it is measured beside."""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mmdeform.ops import _library

__all__ = ["Absent", "Case", "Inputs", "Operator", "Peer", "cast", "off_integers", "require"]

# Arguments of an operator by name. Floating-point tensors get gradients, but for constants.
Inputs = dict[str, Any]


class Absent(Exception):
    """A peer cannot be measured here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another implementation, measured in the same process.

    Attributes:
        name: Shown in results, selects with ``--peers``.
        load: ``load(device_type)`` returns a function of the operator's inputs by name, or raises
            :class:`Absent`.
        same_function: False for a yardstick that computes something else; it is not checked.
        coordinates_as_data: Wants coordinates in the dtype of the data (all but mmdeform do).
        copies: Buffers of :attr:`Operator.samples` elements that forward and backward hold at a
            time; a peer that would not fit into memory is left out.
    """

    name: str
    load: Callable[[str], Callable[..., Tensor]]
    same_function: bool = True
    coordinates_as_data: bool = True
    copies: int = 0


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape and distribution of inputs.

    Attributes:
        name: Unique within its operator; ``--filter`` looks in it.
        make: ``make(batch, generator)`` returns the inputs in fp64 on the CPU. Sampling positions
            stay off integer lines (:func:`off_integers`), where gradients jump.
        batches: Batch sizes measured by default, by device type; a case without an entry for a
            device is measured there with ``--sweep`` or ``--filter`` only.
    """

    name: str
    make: Callable[[int, torch.Generator], Inputs]
    batches: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator of ``mmdeform.ops`` and everything that is needed to measure it.

    Attributes:
        name: Name of its schema, without namespace.
        function: The public function, of the inputs by name.
        reference: The specification, of the same inputs.
        coordinates: Inputs that stay in the accumulation dtype when the data is narrower.
        split: Splits inputs into independent pieces that are small enough for the reference in
            fp64; yields the inputs of each piece and its place in the output.
        samples: Number of interpolated values that one call reads.
        peers: Implementations to compare with.
        cases: Shapes to measure.
        constants: Floating-point inputs without a gradient, such as RoIs; never narrower than fp32,
            for peers neither.
    """

    name: str
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    coordinates: tuple[str, ...]
    split: Callable[[Inputs], Iterator[tuple[Inputs, tuple[slice, ...]]]]
    samples: Callable[[Inputs], int]
    peers: tuple[Peer, ...]
    cases: tuple[Case, ...]
    constants: tuple[str, ...] = ()

    def has_kernel(self, device_type: str) -> bool:
        """False if a call on this device falls back to the reference."""
        return all(
            _library.has_kernel(name, device_type) for name in (self.name, f"{self.name}_backward")
        )


def cast(
    inputs: Inputs, device: torch.device, dtype: torch.dtype, others: dict[str, torch.dtype]
) -> Inputs:
    """Copies inputs to a device and a dtype.

    Args:
        inputs: Arguments of an operator.
        device: Where tensors go.
        dtype: Dtype of floating-point tensors.
        others: Dtypes of those that are not to have ``dtype``, by name.
    """
    return {
        name: value.to(device, others.get(name, dtype) if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }


def off_integers(positions: Tensor, margin: float = 0.01) -> Tensor:
    """Moves positions (pixels) at least ``margin`` away from integers.

    The gradient of bilinear sampling jumps at integers, where rounding to another dtype would
    change its side: there, a right result and the reference may differ by any amount.
    """
    whole = positions.floor()
    return whole + margin + (1 - 2 * margin) * (positions - whole)


def require(module: str) -> Any:
    """Imports a peer's module or raises :class:`Absent`."""
    package = module.split(".")[0]
    if importlib.util.find_spec(package) is None:
        raise Absent(f"{package} is not installed")
    try:
        return importlib.import_module(module)
    except Exception as error:  # a package built for another torch fails in any way
        raise Absent(f"{module} cannot be imported: {error}") from error

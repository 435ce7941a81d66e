"""What each operator refuses: one module per operator, which defines ``ERRORS``."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..contracts.operator import Arguments, Operator

# A change to arguments, and what the error message says of it: a regular expression.
Error = tuple[Callable[[Arguments], dict[str, Any]], str]


@dataclasses.dataclass(frozen=True)
class ArgumentErrors:
    """Changes to the arguments of an operator's case ``"asymmetric"`` that must be refused.

    Attributes:
        operator: The operator's contract.
        public: Changes to the public function's arguments; the message begins as given.
        direct: Changes to the arguments of the schema, by their names there, forward and backward.
        values: Likewise, where what is wrong lies in a tensor's memory: a CUDA kernel cannot look
            at it without waiting for the device.
        numbers: Wrong values of arguments of the schema that are no tensors, by name.
        valid: Axes ``(schema, argument, axis)`` whose growth by one makes another, valid call.
    """

    operator: Operator
    public: Sequence[Error]
    direct: Sequence[Error] = ()
    values: Sequence[Error] = ()
    numbers: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    valid: frozenset[tuple[str, str, int]] = frozenset()


def all_errors() -> list[ArgumentErrors]:
    """``ERRORS`` of every module of this package."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [importlib.import_module(f"{__name__}.{name}").ERRORS for name in names]

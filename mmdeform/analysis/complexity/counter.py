"""Counts the operations of a forward pass, by module and by operator."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .. import flops  # registers what torch lacks  # noqa: F401

__all__ = ["FlopCounter"]

# Products that torch has no formula for.
_PRODUCTS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.mv: lambda matrix, *_, **__: 2 * matrix.numel(),
    torch.ops.aten.addmv: lambda _, matrix, *__, **___: 2 * matrix.numel(),
    torch.ops.aten.dot: lambda vector, *_, **__: 2 * vector.numel(),
    torch.ops.aten.vdot: lambda vector, *_, **__: 2 * vector.numel(),
}


class FlopCounter:
    """Counts by the formulas of ``torch.utils.flop_counter`` while the block runs.

    Unlike ``FlopCounterMode`` it names modules as the model does, also below modules whose
    ``forward`` is called directly, as mmdet calls its heads, and it remembers what it could not
    count.

    Args:
        model: The model whose modules are told apart; operators outside count for ``""``.

    Attributes:
        flops: FLOPs by (name of the innermost module, operator); a multiply-add is two.
        not_counted: Calls of operators without a formula, by operator.
    """

    def __init__(self, model: nn.Module) -> None:
        self.flops: Counter[tuple[str, str]] = Counter()
        self.not_counted: Counter[str] = Counter()
        self._names = {module: name for name, module in model.named_modules()}
        self._running = [""]
        self._paused = False
        self._stack = ExitStack()

    def __enter__(self) -> "FlopCounter":
        for module in self._names:
            for hook in (
                module.register_forward_pre_hook(self._enter),
                module.register_forward_hook(self._leave, always_call=True),
            ):
                self._stack.callback(hook.remove)
        self._stack.enter_context(_Dispatch(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def add(self, name: str, formula: Callable[..., int], *args: Any, **kwargs: Any) -> None:
        """Counts a call of an operator.

        Args:
            name: Of the operator.
            formula: FLOPs by arguments, of which shapes may stand for tensors.
            args: Of the call.
            kwargs: Of the call.
        """
        if not self._paused:
            self.flops[self._running[-1], name] += formula(*args, **kwargs)

    def miss(self, name: str) -> None:
        """Notes a call of an operator without a formula."""
        if not self._paused:
            self.not_counted[name] += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Counts nothing in this block."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._running.append(self._names[module])

    def _leave(self, *_: Any) -> None:
        self._running.pop()


class _Dispatch(TorchDispatchMode):
    """Tells a counter what torch's dispatcher sees."""

    def __init__(self, counter: FlopCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = func._overloadpacket
        formula = flop_registry.get(operator) or _PRODUCTS.get(operator)
        if formula is None:
            # In inference mode composite operators come here whole.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if formula is None:
            self._counter.miss(str(operator))
        else:
            self._counter.add(str(operator), formula, *args, **kwargs, out_val=result)
        return result

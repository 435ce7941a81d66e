"""Makes mmengine's ``get_model_complexity_info`` count the operators of ``mmdeform.ops``.

mmdet's ``tools/analysis_tools/get_flops.py`` uses it too. Importing this module is enough. The
formulas are those that ``mmdeform.ops`` registers with ``torch.utils.flop_counter``; they are
halved, because mmengine counts a multiply-add once where torch counts it twice.

Both counters are also taught ``scaled_dot_product_attention``, which layers here call: torch leaves
it out on the CPU and mmengine everywhere.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from mmengine.analysis import complexity_analysis
from torch.utils.flop_counter import flop_registry

import mmdeform.ops  # registers the formulas  # noqa: F401

__all__ = ["register_attention", "register_flop_counters"]


def register_flop_counters() -> None:
    """Adds every operator of mmdeform that has a FLOP formula to mmengine's tables."""
    for operator, formula in flop_registry.items():
        name = str(operator).replace(".", "::")
        if name.startswith("mmdeform::"):
            complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS[name] = _flop_handle(formula)
            complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS[name] = _output_elements


def register_attention() -> None:
    """Adds torch's own attention where the counters lack it."""
    aten = torch.ops.aten
    forward = flop_registry[aten._scaled_dot_product_flash_attention]
    backward = flop_registry[aten._scaled_dot_product_flash_attention_backward]
    for on_cpu, formula in (
        (aten._scaled_dot_product_flash_attention_for_cpu, forward),
        (aten._scaled_dot_product_flash_attention_for_cpu_backward, backward),
    ):
        flop_registry.setdefault(on_cpu, formula)
    complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.setdefault(
        "aten::scaled_dot_product_attention", _flop_handle(forward)
    )


def _flop_handle(formula: Callable[..., int]) -> Callable[[list, list], int]:
    def handle(inputs: list, outputs: list) -> int:
        arguments = [_argument(value) for value in inputs]
        return formula(*arguments, out_val=_argument(outputs[0])) // 2

    return handle


def _output_elements(inputs: list, outputs: list) -> int:
    return math.prod(_argument(outputs[0]))


def _argument(value: Any) -> Any:
    """A tensor's shape, or a constant number or list of numbers, in a traced graph."""
    if value.isCompleteTensor():
        return value.type().sizes()
    if value.node().kind() == "prim::ListConstruct":
        return [element.toIValue() for element in value.node().inputs()]
    return value.toIValue()


register_flop_counters()
register_attention()

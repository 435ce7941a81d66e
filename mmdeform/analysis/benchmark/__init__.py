"""Speed and memory of the operators beside other implementations.

To add an operator, write a module with an :class:`Operator` (its function, its reference, its peers
and its cases) and list it in :data:`OPERATORS`.
"""

from . import deform_conv2d, ms_deform_attn
from .case import Absent, Case, Operator, Peer
from .environment import describe
from .runner import OURS, CaseResult, Row, Settings, run_case, select

OPERATORS = {
    operator.name: operator for operator in (deform_conv2d.OPERATOR, ms_deform_attn.OPERATOR)
}

__all__ = [
    "OPERATORS",
    "OURS",
    "Absent",
    "Case",
    "CaseResult",
    "Operator",
    "Peer",
    "Row",
    "Settings",
    "describe",
    "run_case",
    "select",
]

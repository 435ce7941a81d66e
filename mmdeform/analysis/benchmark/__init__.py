"""Speed and memory of the operators beside other implementations.

To add an operator, write a module with an :class:`Operator` (its function, its reference, its peers
and its cases) and list it in :data:`OPERATORS`.
"""

from . import (
    dat_attn,
    dcnv3,
    dcnv4,
    deform_conv2d,
    deform_ps_roi_pool,
    deform_roi_pool,
    ms_deform_attn,
)
from .case import Absent, Case, Operator, Peer
from .environment import describe
from .runner import OURS, CaseResult, Row, Settings, run_case, select

OPERATORS = {
    module.OPERATOR.name: module.OPERATOR
    for module in (
        dat_attn,
        dcnv3,
        dcnv4,
        deform_conv2d,
        deform_ps_roi_pool,
        deform_roi_pool,
        ms_deform_attn,
    )
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

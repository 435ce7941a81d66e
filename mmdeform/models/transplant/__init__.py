"""Replaces any module of a detector by config.

Each file has one idea: ``transplant`` what a config names and what happens in which order,
``select`` names of modules and patterns, ``arguments`` what a new module learns from the old one,
``graft`` weights, initialisation and state.
"""

from .transplant import Transplant

__all__ = ["Transplant"]

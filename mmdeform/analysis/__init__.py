"""Library code behind the analysis tools."""

from . import flops

__all__ = ["flops"]

"""DAT and DAT++, the vision transformers with deformable attention."""

from .checkpoint import load_dat_checkpoint
from .dat import DAT

__all__ = ["DAT", "load_dat_checkpoint"]

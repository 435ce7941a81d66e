"""DAT and DAT++, the vision transformers with deformable attention."""

from .dat import DAT

__all__ = ["DAT"]

"""The published architectures of InternImage and FlashInternImage, and how a config changes them.

Source: detection configs of https://github.com/OpenGVLab/InternImage and
https://github.com/OpenGVLab/DCNv4.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..base import STAGES

__all__ = ["FLASH_INTERN_IMAGE", "INTERN_IMAGE", "Arch", "make_arch"]


@dataclasses.dataclass(frozen=True)
class Arch:
    """A backbone; the attributes are the settings of :class:`InternImage`."""

    channels: int
    depths: tuple[int, ...]
    groups: tuple[int, ...]
    drop_path_rate: float
    post_norm: bool
    offset_scale: float = 1.0
    mlp_ratio: float = 4.0
    layer_scale: float | None = 1.0
    dw_kernel_size: int | None = None
    dcn_output_bias: bool = True
    mlp_fc2_bias: bool = True


INTERN_IMAGE = {
    "tiny": Arch(64, (4, 4, 18, 4), (4, 8, 16, 32), 0.2, post_norm=False),
    "small": Arch(80, (4, 4, 21, 4), (5, 10, 20, 40), 0.3, post_norm=True),
    "base": Arch(112, (4, 4, 21, 4), (7, 14, 28, 56), 0.4, post_norm=True),
    "large": Arch(160, (5, 5, 22, 5), (10, 20, 40, 80), 0.4, post_norm=True, offset_scale=2.0),
    "xlarge": Arch(192, (5, 5, 24, 5), (12, 24, 48, 96), 0.4, post_norm=True, offset_scale=2.0),
}

_WITHOUT_BIASES = dict(dcn_output_bias=False, mlp_fc2_bias=False)
FLASH_INTERN_IMAGE = {
    "tiny": dataclasses.replace(INTERN_IMAGE["tiny"], **_WITHOUT_BIASES),
    "small": dataclasses.replace(INTERN_IMAGE["small"], dw_kernel_size=3, **_WITHOUT_BIASES),
    "base": dataclasses.replace(
        INTERN_IMAGE["base"],
        drop_path_rate=0.3,
        offset_scale=0.5,
        dw_kernel_size=3,
        **_WITHOUT_BIASES,
    ),
    "large": dataclasses.replace(INTERN_IMAGE["large"], dw_kernel_size=3),
}


def make_arch(archs: Mapping[str, Arch], arch: str, changes: Mapping[str, Any]) -> Arch:
    """The architecture of a name, with what a config wants different.

    Args:
        archs: :data:`INTERN_IMAGE` or :data:`FLASH_INTERN_IMAGE`.
        arch: Key of it.
        changes: Settings that replace those of the architecture, named as in :class:`Arch`.

    Raises:
        ValueError: A name is unknown, or a setting does not describe 4 stages.
    """
    if arch not in archs:
        raise ValueError(f"arch: expected one of {tuple(archs)}, got {arch!r}")
    names = sorted(field.name for field in dataclasses.fields(Arch))
    unknown = sorted(set(changes) - set(names))
    if unknown:
        raise ValueError(f"there is no argument {unknown[0]!r}; settings are {names}")
    for name in ("depths", "groups"):
        values = changes.get(name, (1,) * STAGES)
        if len(values) != STAGES or min(values) < 1:
            raise ValueError(
                f"{name}: expected {STAGES} positive numbers, one per stage, got {values}"
            )
    return dataclasses.replace(archs[arch], **changes)

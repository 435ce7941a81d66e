"""The published architectures of DAT and DAT++, and how a config changes them.

Source: configs of https://github.com/LeapLabTHU/DAT (tag CVPR2022 for v1).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..base import STAGES

__all__ = ["ARCHS", "BLOCKS", "Arch", "StageSpec", "make_arch"]

BLOCKS = {
    "L": "window attention",
    "S": "shifted window attention",
    "D": "deformable attention",
    "N": "neighbourhood attention",
    "P": "attention to a downsampled map",
}

# What the architectures of a version have in common: one value for all stages, or four.
_V1: dict[str, Any] = dict(
    conv_stem=False,
    strides=(4, 2, 1, 1),  # published for stages 3 and 4; the others are the paper's ablation
    kernel_sizes=(9, 7, 5, 3),
    offset_range_factors=2.0,
    window_sizes=7,
    neighborhood_sizes=7,
    sr_ratios=(8, 4, 2, 1),
    position_bias="relative",
    use_offsets=True,
    lpu=False,
    dwc_mlp=False,
    layer_scale=None,
    mlp_ratio=4.0,
)
_PP = dict(
    _V1,
    conv_stem=True,
    strides=(8, 4, 2, 1),
    offset_range_factors=-1.0,
    lpu=True,
    dwc_mlp=True,
    stage_specs=("ND", "NDND", "ND" * 9, "DD"),
)

ARCHS: dict[str, dict[str, dict[str, Any]]] = {
    "v1": {
        "tiny": dict(
            _V1,
            stem_dims=96,
            dims=(96, 192, 384, 768),
            stage_specs=("LS", "LS", "LD" * 3, "LD"),
            num_heads=(3, 6, 12, 24),
            num_groups=(1, 2, 3, 6),
            drop_path_rate=0.2,
        ),
        "small": dict(
            _V1,
            stem_dims=96,
            dims=(96, 192, 384, 768),
            stage_specs=("LS", "LS", "LD" * 9, "LD"),
            num_heads=(3, 6, 12, 24),
            num_groups=(1, 2, 3, 6),
            drop_path_rate=0.3,
        ),
        "base": dict(
            _V1,
            stem_dims=128,
            dims=(128, 256, 512, 1024),
            stage_specs=("LS", "LS", "LD" * 9, "LD"),
            num_heads=(4, 8, 16, 32),
            num_groups=(1, 2, 4, 8),
            drop_path_rate=0.5,
        ),
    },
    "pp": {
        "tiny": dict(
            _PP,
            stem_dims=64,
            dims=(64, 128, 256, 512),
            num_heads=(2, 4, 8, 16),
            num_groups=(1, 2, 4, 8),
            drop_path_rate=0.2,
        ),
        "small": dict(
            _PP,
            stem_dims=96,
            dims=(96, 192, 384, 768),
            num_heads=(3, 6, 12, 24),
            num_groups=(1, 2, 3, 6),
            drop_path_rate=0.4,
        ),
        "base": dict(
            _PP,
            stem_dims=128,
            dims=(128, 256, 512, 1024),
            num_heads=(4, 8, 16, 32),
            num_groups=(2, 4, 8, 16),
            drop_path_rate=0.7,
        ),
    },
}


@dataclasses.dataclass(frozen=True)
class StageSpec:
    """One stage; every attribute is an argument of :class:`DAT`, or one entry of it."""

    stage_specs: str
    dims: int
    num_heads: int
    num_groups: int
    strides: int
    kernel_sizes: int
    offset_range_factors: float
    window_sizes: int
    neighborhood_sizes: int
    sr_ratios: int
    position_bias: str | None
    use_offsets: bool
    lpu: bool
    dwc_mlp: bool
    layer_scale: float | None
    mlp_ratio: float


@dataclasses.dataclass(frozen=True)
class Arch:
    """A whole backbone."""

    stem_dims: int
    conv_stem: bool
    drop_path_rate: float
    stages: tuple[StageSpec, ...]


_PER_STAGE = tuple(field.name for field in dataclasses.fields(StageSpec))
_WHOLE = ("stem_dims", "conv_stem", "drop_path_rate")


def make_arch(arch: str, version: str, changes: Mapping[str, Any]) -> Arch:
    """The architecture of a name, with what a config wants different.

    Args:
        arch: Key of ``ARCHS[version]``.
        version: Key of :data:`ARCHS`.
        changes: Settings that replace those of the architecture: names as in :class:`Arch` and
            :class:`StageSpec`. Settings of stages have 4 values or one for all. ``depths`` may
            repeat the lengths of ``stage_specs``.

    Raises:
        ValueError: A name or value is unknown, or settings contradict each other.
    """
    for name, value, known in (
        ("version", version, tuple(ARCHS)),
        ("arch", arch, tuple(ARCHS.get(version, ()))),
    ):
        if value not in known:
            raise ValueError(f"{name}: expected one of {known}, got {value!r}")
    names = (*_WHOLE, *_PER_STAGE, "depths")
    unknown = sorted(set(changes) - set(names))
    if unknown:
        raise ValueError(f"DAT has no argument {unknown[0]!r}; its settings are {sorted(names)}")
    settings = {**ARCHS[version][arch], **changes}
    depths = settings.pop("depths", None)
    columns = {name: _per_stage(name, settings[name]) for name in _PER_STAGE}
    stages = tuple(
        StageSpec(**dict(zip(columns, row, strict=True)))
        for row in zip(*columns.values(), strict=True)
    )
    for index, stage in enumerate(stages):
        _check(index, stage)
    own = tuple(len(stage.stage_specs) for stage in stages)
    if depths is not None and _per_stage("depths", depths) != own:
        raise ValueError(
            f"depths: expected {own}, the lengths of stage_specs {columns['stage_specs']}, "
            f"got {depths}"
        )
    return Arch(**{name: settings[name] for name in _WHOLE}, stages=stages)


def _per_stage(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        return (value,) * STAGES
    if len(value) != STAGES:
        raise ValueError(
            f"{name}: expected {STAGES} values, one per stage, or a single one for all, "
            f"got {len(value)}: {value}"
        )
    return tuple(value)


def _check(index: int, stage: StageSpec) -> None:
    codes = stage.stage_specs
    if not isinstance(codes, str) or not codes or set(codes) - set(BLOCKS):
        known = ", ".join(f"{code} ({meaning})" for code, meaning in BLOCKS.items())
        raise ValueError(
            f"stage_specs[{index}]: expected a string of the codes {known}, got {codes!r}"
        )
    if stage.num_heads < 1 or stage.dims % stage.num_heads:
        raise ValueError(
            f"num_heads[{index}]: expected a divisor of dims[{index}] = {stage.dims}, "
            f"got {stage.num_heads}"
        )
    if "D" in codes and (stage.num_groups < 1 or stage.num_heads % stage.num_groups):
        raise ValueError(
            f"num_groups[{index}]: expected a divisor of num_heads[{index}] = {stage.num_heads}, "
            f"got {stage.num_groups}"
        )

"""Small DATs that have everything, in a few blocks."""

from typing import Any

from mmdeform.models import DAT

SPECS = {"v1": ("LS", "LD", "SD", "P"), "pp": ("ND", "N", "PD", "DL")}


def small_dat(version: str, **options: Any) -> DAT:
    """A backbone for images of 64 pixels with a few thousand parameters."""
    settings: dict[str, Any] = dict(
        img_size=64,
        stem_dims=8,
        dims=(16, 16, 32, 32),
        stage_specs=SPECS[version],
        num_heads=(1, 2, 2, 4),
        num_groups=(1, 1, 2, 2),
        window_sizes=(7, 4, 3, 2),
        neighborhood_sizes=(5, 3, 3, 3),
        mlp_ratio=2,
        drop_path_rate=0.0,
    )
    return DAT("tiny", version, **{**settings, **options})

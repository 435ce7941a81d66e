"""Small InternImages and FlashInternImages."""

from typing import Any

from mmdeform.models import FlashInternImage, InternImage

KINDS: dict[str, type[InternImage]] = {"v3": InternImage, "v4": FlashInternImage}
SMALL: dict[str, Any] = dict(
    channels=8, depths=(1, 2, 1, 1), groups=(1, 2, 2, 4), mlp_ratio=2.0, drop_path_rate=0.0
)


def small_intern_image(kind: str, **options: Any) -> InternImage:
    """A backbone with a few thousand parameters; ``kind`` is that of its DCNs."""
    return KINDS[kind](**{**SMALL, **options})

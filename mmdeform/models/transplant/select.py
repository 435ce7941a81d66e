"""Which modules a pattern selects."""

from collections import defaultdict
from collections.abc import Sequence
from difflib import SequenceMatcher

from torch import nn

from mmdeform.layers.names import matches

__all__ = ["select"]

_LISTED = 20  # names in an error


def select(root: nn.Module, patterns: str | Sequence[str]) -> list[str]:
    """Finds modules by their dotted names.

    Args:
        root: Where names start; never selected itself.
        patterns: A pattern or several. Each part of a name, between dots, is matched as a file name
            is in a shell: ``*``, ``?``, ``[34]``, ``[!1]``. ``**`` stands for any number of parts.

    Returns:
        Names in the order of ``named_modules``, those of shared modules included.

    Raises:
        ValueError: A pattern selects nothing; tells what there is near it.
    """
    names = [name for name, _ in root.named_modules(remove_duplicate=False) if name]
    selected = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = [name for name in names if matches(name.split("."), pattern.split("."))]
        if not found:
            raise ValueError(f"{pattern!r} selects no module: {_explain(root, pattern)}")
        selected.update(found)
    return [name for name in names if name in selected]


def _explain(root: nn.Module, pattern: str) -> str:
    """Names the longest beginning of the pattern that exists, and what is in it."""
    parts = pattern.split(".")
    modules = list(root.named_modules(remove_duplicate=False))
    for length in reversed(range(len(parts))):
        parents = [module for name, module in modules if matches(_split(name), parts[:length])]
        if parents:
            break
    place = repr(".".join(parts[:length])) if length else type(root).__name__
    kinds: dict[str, set[str]] = defaultdict(set)
    for parent in parents:
        for name, child in parent.named_children():
            kinds[name].add(type(child).__name__)
    if not kinds:
        return f"there is nothing in {place} ({type(parents[0]).__name__})"
    wanted = parts[length]
    near = sorted(kinds, key=lambda name: -SequenceMatcher(None, name, wanted).ratio())
    listed = [f"{name} ({' or '.join(sorted(kinds[name]))})" for name in near[:_LISTED]]
    if len(near) > _LISTED:
        listed.append(f"and {len(near) - _LISTED} more")
    return f"there is no {wanted!r} in {place}, which has {', '.join(listed)}"


def _split(name: str) -> list[str]:
    return name.split(".") if name else []

"""Patterns that select modules by their dotted names, as options of configs have them."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

__all__ = ["matches"]


def matches(name: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a name fits a pattern, both split at the dots.

    Each part is matched as a file name is in a shell: ``*``, ``?``, ``[34]``, ``[!1]``. ``**``
    stands for any number of parts.
    """
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(matches(name[start:], pattern[1:]) for start in range(len(name) + 1))
    return bool(name) and fnmatchcase(name[0], pattern[0]) and matches(name[1:], pattern[1:])

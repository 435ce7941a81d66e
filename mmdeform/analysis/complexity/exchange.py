"""Another value of an attribute, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["exchanged"]

_ABSENT = object()


@contextmanager
def exchanged(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute of a class, module or object while the block runs.

    Afterwards the very object is there again that was there before, if ``owner`` itself and not
    its class had one.
    """
    before = vars(owner).get(name, _ABSENT)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

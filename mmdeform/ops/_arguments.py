"""Arguments that the public functions of several operators share."""

from collections.abc import Sequence


def pair(value: int | Sequence[int], name: str, minimum: int) -> list[int]:
    """Two integers of at least ``minimum`` from one or two; ``name`` is for the error."""
    values = list(value) if isinstance(value, Sequence) else [value, value]
    if len(values) != 2 or any(not isinstance(v, int) or v < minimum for v in values):
        raise ValueError(
            f"{name}: expected an integer or (vertical, horizontal), each >= {minimum}, got {value}"
        )
    return values

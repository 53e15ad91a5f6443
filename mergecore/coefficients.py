"""One coefficient for all experts or one for each, in the order of the recipe: how such a field is checked and read."""

from __future__ import annotations

from collections.abc import Sequence

from mergecore.errors import SpecError

Coefficients = float | tuple[float, ...]


def check_coefficients(field: str, value: Coefficients, count: int) -> None:
    """Raise SpecError where a list does not hold one coefficient per expert."""
    if isinstance(value, tuple) and len(value) != count:
        raise SpecError(
            f"{field}: {len(value)} given for {count} experts; give one per expert, or a single one for all"
        )


def reordered(value: Coefficients, order: Sequence[int]) -> Coefficients:
    """A list moved along with its experts."""
    return tuple(value[position] for position in order) if isinstance(value, tuple) else value


def spread(value: Coefficients, count: int) -> tuple[float, ...]:
    """One coefficient per expert."""
    return value if isinstance(value, tuple) else (value,) * count

"""Parameters that are one value for all experts, or one for each in the order of the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import Discriminator, Tag

from mergecore.errors import SpecError

ONE, EACH = Tag("(one)"), Tag("(each)")
ONE_OR_EACH = Discriminator(lambda value: "(each)" if isinstance(value, list | tuple) else "(one)")
"""For a parameter that is one value for all experts, or a list of one per expert; the tags stay out of error
messages."""


def experts_given(count: int) -> str:
    """Return half a sentence for an error: how many experts there are."""
    return f"{count} experts are given" if count != 1 else "1 expert is given"


def check_each(name: str, values: Any, count: int) -> None:
    """Raise SpecError where a parameter is a list of other length than `count`, the number of experts."""
    if isinstance(values, tuple) and len(values) != count:
        raise SpecError(f"{name}: {len(values)} given for {count} experts; give one per expert, or one value for all")


def each(values: float | tuple[float, ...], count: int) -> tuple[float, ...]:
    """Return one value per expert."""
    return values if isinstance(values, tuple) else (values,) * count


def check_weights(weights: tuple[float, ...] | None, count: int) -> None:
    """Raise SpecError where there is not one weight per expert, or where the weights cannot form a mean."""
    if weights is None:
        return
    if len(weights) != count:
        raise SpecError(
            f"weights: {len(weights)} given for {count} experts; give one per expert, or none for equal ones"
        )
    if not any(weights):
        raise SpecError("weights: all are 0; give at least one expert another weight")


Values = TypeVar("Values")


def moved(values: Values, order: Sequence[int]) -> Values:
    """Return values that are one per expert in the order in which experts are folded; one value for all as it is."""
    return type(values)(values[position] for position in order) if isinstance(values, tuple) else values

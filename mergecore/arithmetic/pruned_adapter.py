"""What methods share that make an adapter of pruned values: by magnitude, and at random before."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from mergecore.plugins.adapter_method import AdapterMethod
from mergecore.plugins.per_expert import check_each, moved


class PrunedAdapter(AdapterMethod, ABC):
    """A method with a `drop` and with values that may be one for all experts or one for each."""

    per_expert: ClassVar[tuple[str, ...]] = ("density",)
    """The fields that may hold one value for each expert."""

    if TYPE_CHECKING:  # declared by every method, at the place among its fields where it stands on pages
        drop: Any

    @property
    def needs_ids(self) -> bool:
        return self.drop is not None

    def validate_count(self, count: int) -> None:
        for name in self.per_expert:
            check_each(name, getattr(self, name), count)
        check_each("drop.rate", self.drop and self.drop.rate, count)

    def bound(self, order: Sequence[int]) -> Self:
        changes = {name: moved(getattr(self, name), order) for name in self.per_expert}
        return self.model_copy(update={**changes, "drop": self.drop and self.drop.bound(order)})

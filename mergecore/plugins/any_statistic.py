"""What a method must know beforehand, of whatever kind: streamed, on models, a chain, or an adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from mergecore.plugins.plugin import Plugin


class AnyStatistic(Plugin, ABC):
    """A plug-in whose result other plug-ins are handed under a name.

    A new kind of statistic adds one method to those who visit kinds: the planner, the merge in memory and the docs.
    """

    shown_as: ClassVar[str] = "statistic"
    """What one result is called in logs and on pages."""
    cost: ClassVar[str] = ""
    """What it costs beside readings, as the end of a sentence in docs/methods.md."""
    takes_data: ClassVar[bool] = False
    """Whether it looks at more than weights, so that `mergecore.merge` must be handed its result."""
    registered: ClassVar[bool] = True
    """Whether it stands in the registry under its name."""
    chained: ClassVar[bool] = False
    """Whether it goes on from what it was before the newest expert: changes are then counted from the pool's base."""

    @property
    def readings(self) -> int:
        """How often the models are read from end to end for it."""
        return 0

    def statistics(self) -> Mapping[str, AnyStatistic]:
        """Return what this statistic must know beforehand, by the name it is handed under."""
        return {}

    def handed(self, count: int) -> int:
        """Return how many results its owner is handed where they are worked out elsewhere. count: of the experts."""
        return count

    @abstractmethod
    def visit(self, kinds: Any) -> Any:
        """Call the method of `kinds` that is for this kind of statistic, and return its answer."""

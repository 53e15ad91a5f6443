"""A search that tries one number of the method, and one more where that is better than nothing."""

from typing import ClassVar

from mergecore.plugins.search import Ask, Ground, Rounds, Search


class FirstOnly(Search):
    """Tries `limit` 1 and then 0.5, and keeps the better one."""

    name: ClassVar[str] = "first_only"
    version: ClassVar[int] = 1

    def rounds(self, ground: Ground) -> Rounds:
        whole, half = (ground.candidate(ground.experts, {"limit": limit}) for limit in (1.0, 0.5))
        (first,) = yield Ask((whole,))
        (second,) = yield Ask((half,), whole)
        return half if first is None or (second is not None and second.mean > first.mean) else whole

    def most(self, ground: Ground) -> int:
        return 2

"""The fused loops of a reading: each is worked out once per process, whatever spans it runs there."""

from __future__ import annotations

from typing import Any

from mergecore.engine.kernels.run import Fused
from mergecore.engine.kernels.source import Out
from mergecore.engine.pass_plan import Round

WORTH_BUILDING = 1 << 24
"""Elements of a pass from which on a fused loop that is not at hand is built."""


class Loops:
    """Finds the fused loop of a function."""

    def __init__(self, round: Round) -> None:
        self._plan, self._known = round.plan, round.fused

    def fused(self, key: tuple[Any, ...], function: Any, on: Any, out: Out, windows: int = 0) -> Fused:
        """Return the loop that is known under `key` and `windows`, or a new one for `function`."""
        key = (*key, windows)
        loop: Fused | None = self._known.get(key)
        if loop is None:
            build = self._plan.elements >= WORTH_BUILDING
            loop = self._known[key] = Fused(function, on, out, self._plan.library, build, windows=windows)
        return loop

"""The fused loops of a reading of the models: each process looks for a loop once, however many spans it does."""

from __future__ import annotations

from typing import Any

from mergecore.engine.kernels.run import Fused
from mergecore.engine.kernels.source import Out
from mergecore.engine.pass_plan import PassReading

WORTH_BUILDING = 1 << 24
"""A pass of at least so many elements builds a fused loop that the library does not have."""


class Loops:
    """Finds the fused loop of a function."""

    def __init__(self, reading: PassReading) -> None:
        self._plan, self._known = reading.plan, reading.fused

    def fused(self, key: tuple[Any, ...], function: Any, on: Any, out: Out, with_base: bool, slots: int = 0) -> Fused:
        """Return the loop that is known under `key` and `slots`, or a new one for `function` (see `Fused`)."""
        key = (*key, slots)
        loop: Fused | None = self._known.get(key)
        if loop is None:
            build = self._plan.elements >= WORTH_BUILDING
            library = self._plan.library
            loop = Fused(function, on, out, library, build, slots=slots, with_base=with_base)
            self._known[key] = loop
        return loop

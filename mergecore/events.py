"""What is told while something takes its time. Imports nothing, so that whoever tells it need not wait for torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """Something worth telling: what is being done, how much of it is done, out of how much, in which unit."""

    what: str
    done: float = 0
    total: float = 0
    unit: str = ""


Report = Callable[[Event], None]
"""Where progress goes, from any thread. Nothing in mergecore prints."""


def silent(event: Event) -> None:
    """A `report` that says nothing."""

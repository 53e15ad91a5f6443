"""Progress events of long work. This module imports nothing heavy, so that reporting does not wait for torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """Progress of one activity: how much is done, out of how much, in which unit."""

    activity: str
    done: float = 0
    total: float = 0
    unit: str = ""


Report = Callable[[Event], None]
"""Where progress goes, from any thread. Nothing in mergecore prints."""


def silent(event: Event) -> None:
    """Report nothing."""

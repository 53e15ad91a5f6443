"""What a piece of work completed, and what is recorded of a step that failed."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mergecore.errors import MergeloomError
from mergecore.identity.keys import Step
from mergecore.store.store import Store

RECORDED = (MergeloomError, ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)
"""What is recorded as the failure of a step, and does not stop the others: our own errors, and those that a plug-in or
torch (out of memory, say) may raise. Not among them: errors of the system, interruption, cancelling."""


def reason(error: BaseException) -> str:
    """Why a step failed, for its record: our own errors are sentences, others need their kind said."""
    return str(error) if isinstance(error, MergeloomError) else f"{type(error).__name__}: {error}"


@dataclass
class Done:
    """What a piece of work completed: names of steps done in it (none of what others had done before), and {name: reason}
    of those that failed."""

    steps: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def note(self, other: Done) -> Done:
        """Both together."""
        return Done(self.steps + other.steps, {**self.failures, **other.failures}, self.seconds + other.seconds)


def failed(store: Store, steps: Sequence[Step], error: Exception) -> Done:
    """The same reason recorded for all of these steps that are not done."""
    open_ones = [step for step in steps if not store.is_done(step)]
    for step in open_ones:
        store.fail(step, reason(error))
    return Done([], {step.name: reason(error) for step in open_ones})


def made_with(began: float) -> dict[str, Any]:
    """How a result was made: never part of a key, always part of its record."""
    return {
        "seconds": round(time.monotonic() - began, 3),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }

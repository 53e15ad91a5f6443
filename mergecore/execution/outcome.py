"""What a piece of work completed, and what is recorded of a step that failed."""

from __future__ import annotations

import platform
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mergecore.errors import MergeloomError, PluginError, masked
from mergecore.identity.keys import Step
from mergecore.store.store import Store

RECORDED = (MergeloomError, ArithmeticError, RuntimeError, ValueError)
"""What is recorded as the failure of a step and does not stop the others: our own errors, and what torch and a
plug-in's arithmetic may raise (out of memory, a singular matrix). A programming error (TypeError, LookupError,
AssertionError) is no property of a step: it ends the sweep with its traceback, and what is finished is kept."""


def reason(error: BaseException) -> str:
    """Return why a step failed. Our own errors are sentences; others are told with their type."""
    return str(error) if isinstance(error, MergeloomError) else masked(f"{type(error).__name__}: {error}")


@dataclass
class Done:
    """What a piece of work completed. steps: names of the steps that it did, without those that others had done before.

    failures: {name: reason} of the steps that failed. seconds: how long it took.
    """

    steps: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def note(self, other: Done) -> Done:
        """Return both together."""
        return Done(self.steps + other.steps, {**self.failures, **other.failures}, self.seconds + other.seconds)

    def lasting(self, seconds: float) -> Done:
        """Return the same with another duration."""
        return Done(self.steps, self.failures, seconds)


def failed(store: Store, steps: Sequence[Step], error: Exception) -> Done:
    """Record why the steps that are not done failed, with the traceback; return their reasons.

    Raise the error where it is a PluginError: once the module is there the same steps go through.
    """
    if isinstance(error, PluginError):
        raise error
    open_steps = [step for step in steps if not store.is_done(step)]
    for step in open_steps:
        store.fail(step, reason(error), "".join(traceback.format_exception(error)))
    return Done([], {step.name: reason(error) for step in open_steps})


def made_with(began: float) -> dict[str, Any]:
    """Return how a result was made. It is part of the record, never of a key."""
    return {
        "seconds": round(time.monotonic() - began, 3),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }

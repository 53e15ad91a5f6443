"""What the tasks share: how work is handed to them, and how they end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from mergecore.execution.outcome import Done
from mergecore.execution.place import Place

OPTIONS: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}
"""Prefect's own result cache is off: the store is the one truth."""


class Work:
    """Work and the place to do it. A plain class: Prefect looks into dataclasses and lists for futures, not into this."""

    def __init__(self, place: Place, items: Sequence[Any] = ()) -> None:
        self.place, self.items = place, items


def ended(done: Done) -> State[Any]:
    """The state a task ends in: Completed, its message saying what was done and what failed."""
    message = f"{counted(len(done.steps), 'step')} in {done.seconds:.1f} s"
    logger = get_run_logger()
    for name, reason in done.failures.items():
        logger.warning("%s failed: %s", name, reason)
    if done.failures:
        return Completed(
            name="With failures", message=f"{message}; {len(done.failures)} failed: {first(done)}", data=None
        )
    return Completed(message=message, data=None)


def first(done: Done) -> str:
    """The first failure as a sentence."""
    return next((f"{name}: {reason}" for name, reason in done.failures.items()), "")


def cached(count: int, what: str) -> State[Any]:
    """The state of a task whose work was all done before. what: one of them, as in 'model'."""
    return Completed(name="Cached", message=f"{counted(count, what)} found in the store", data=None)


def counted(count: int, what: str) -> str:
    """'1 model', '2 models'."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


@task(name="reuse", task_run_name="reuse {what}", **OPTIONS)
def reuse(what: str) -> State[Any]:
    """Shows in one line how much of a kind an earlier run has finished. what: '5 merged models', say."""
    return Completed(name="Cached", message=f"{what} found in the store", data=None)

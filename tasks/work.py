"""Work as it is handed to a task, and the states that tasks end in."""

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
"""Prefect's own result cache is off: the store alone knows what is done."""


class TaskInput:
    """Items of work, and the place to do it. A plain class: Prefect looks for futures in dataclasses and lists."""

    def __init__(self, place: Place, items: Sequence[Any] = ()) -> None:
        self.place, self.items = place, items


def ended(done: Done) -> State[Any]:
    """Return the state a task ends in: Completed, with a message that says what was done and what failed."""
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
    """Return the first failure as a sentence."""
    return next((f"{name}: {reason}" for name, reason in done.failures.items()), "")


def cached(count: int, noun: str) -> State[Any]:
    """Return the state of a task whose work was done before. noun: in the singular, 'model'."""
    return Completed(name="Cached", message=f"{counted(count, noun)} found in the store", data=None)


def counted(count: int, noun: str) -> str:
    """Return '1 model', '2 models'."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


@task(name="reuse", task_run_name="reuse {results}", **OPTIONS)
def reuse(results: str) -> State[Any]:
    """Show in one line how many results of a kind an earlier run has finished. results: '5 merged models'."""
    return Completed(name="Cached", message=f"{results} found in the store", data=None)

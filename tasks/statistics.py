"""Masks, thresholds and Fisher information: what methods must know beforehand, each worked out once."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.client.schemas.objects import State

from mergecore.execution.lanes import run_works
from tasks.work import OPTIONS, TaskInput, cached, ended


@task(name="statistics", task_run_name="statistics {name}", **OPTIONS)
def statistics(name: str, work: TaskInput) -> State[Any]:
    """Complete `work.items`, works whose inputs are at hand: streamed ones in one pass, the others one by one."""
    missing = [item for item in work.items if not work.place.store.is_done(item.step, bytes_needed=True)]
    return ended(run_works(work.place, missing)) if missing else cached(len(work.items), "statistic")

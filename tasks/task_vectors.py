"""Profiles of task vectors: norms and counts of bit patterns of every expert, in one pass."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.client.schemas.objects import State

from mergecore.execution.lanes import run_works
from tasks.work import OPTIONS, TaskInput, cached, ended


@task(name="task vectors", task_run_name="task vectors {name}", **OPTIONS)
def task_vectors(name: str, work: TaskInput) -> State[Any]:
    """Complete the profiles of `work.items`, plans of statistics, in one pass."""
    missing = [plan for plan in work.items if not work.place.store.is_done(plan.step, bytes_needed=True)]
    return ended(run_works(work.place, missing)) if missing else cached(len(work.items), "profile")

"""Merges: many models completed in one pass over their pool, spans spread over the workers."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.client.schemas.objects import State

from mergecore.run import run_merges
from mergecore.store import State as StoreState
from tasks.work import OPTIONS, Work, cached, ended


@task(name="merge", task_run_name="merge {name}", **OPTIONS)
def merge(name: str, work: Work) -> State[Any]:
    """`work.items`: plans of merges."""
    missing = [plan for plan in work.items if work.place.store.state(plan.step) is not StoreState.PRESENT]
    return ended(run_merges(work.place, missing)) if missing else cached(len(work.items), "models")

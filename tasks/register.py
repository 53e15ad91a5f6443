"""Registration: the best cell's model is published in the store and named in the registration record."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.client.schemas.objects import State

from mergecore.sweeps.complete import register_best
from mergecore.sweeps.remaining import Frontier
from tasks.work import OPTIONS, TaskInput, cached, ended


@task(name="register", task_run_name="register {name}", **OPTIONS)
def register(name: str, work: TaskInput) -> State[Any]:
    """Register the best cell of the frontier in `work.items`. The state is Cached where it is registered already."""
    frontier: Frontier = work.items[0]
    done = register_best(work.place, frontier)
    return ended(done) if done.steps or done.failures else cached(1, "registration")

"""Evaluations: a batch of models scored side by side, all tasks of a model on one worker."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.client.schemas.objects import State

from mergecore.execution.evaluations import run_scorings
from tasks.work import OPTIONS, TaskInput, cached, ended


@task(name="evaluate", task_run_name="evaluate {name}", **OPTIONS)
def evaluate(name: str, work: TaskInput) -> State[Any]:
    """Score `work.items`: scorings, each a cell and the tasks on which it is still to be scored."""
    store = work.place.store
    missing = [scoring for scoring in work.items if not all(store.is_done(step) for _, _, step in scoring.tasks)]
    return ended(run_scorings(work.place, missing)) if missing else cached(len(work.items), "scored model")

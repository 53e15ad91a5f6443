"""Downloads: a checkpoint is fetched, checked against its digests and recorded."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.client.schemas.objects import State

from mergecore.execution.fetch import fetch
from mergecore.execution.outcome import Done
from mergecore.planning.pool import snapshot_step
from tasks.work import OPTIONS, TaskInput, cached, ended


@task(name="download", task_run_name="download {name}", **OPTIONS)
def download(name: str, work: TaskInput) -> State[Any]:
    """Fetch `work.items`, snapshots. The state is Cached where all were recorded before; their files are checked
    anyway.
    """
    known = all(work.place.store.is_done(snapshot_step(snapshot)) for snapshot in work.items)
    done = Done()
    for snapshot in work.items:
        done = done.note(fetch(work.place, snapshot))
    return cached(len(work.items), "checkpoint") if known else ended(done)

"""Have a checkpoint at hand: fetched, checked against its digests and recorded."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.client.schemas.objects import State

from mergecore.execution.fetch import fetch
from mergecore.planning.pool import snapshot_step
from tasks.work import OPTIONS, Work, cached, ended


@task(name="download", task_run_name="download {name}", **OPTIONS)
def download(name: str, work: Work) -> State[Any]:
    """`work.items`: snapshots. Cached where all of them are recorded already (their files are looked up all the same)."""
    known = all(work.place.store.is_done(snapshot_step(snapshot)) for snapshot in work.items)
    done = [fetch(work.place, snapshot) for snapshot in work.items]
    if known:
        return cached(len(done), "checkpoint")
    total = done[0]
    for one in done[1:]:
        total = total.note(one)
    return ended(total)

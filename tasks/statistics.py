"""Masks, thresholds and Fisher information: what methods must know beforehand, each worked out once."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.client.schemas.objects import State

from mergecore.execution.evaluations import run_data_statistics
from mergecore.execution.outcome import Done
from mergecore.execution.passes import run_statistics
from mergecore.plugins.statistic import DataStatistic
from tasks.work import OPTIONS, Work, cached, ended


@task(name="statistics", task_run_name="statistics {name}", **OPTIONS)
def statistics(name: str, work: Work) -> State[Any]:
    """`work.items`: plans of statistics; streamed ones are completed in one pass, those on data one after another."""
    missing = [plan for plan in work.items if not work.place.store.is_done(plan.step, bytes_needed=True)]
    if not missing:
        return cached(len(work.items), "statistic")
    streamed = [plan for plan in missing if not isinstance(plan.statistic, DataStatistic)]
    with_data = [plan for plan in missing if isinstance(plan.statistic, DataStatistic)]
    done = run_statistics(work.place, streamed) if streamed else Done()
    return ended(done.note(run_data_statistics(work.place, with_data)) if with_data else done)

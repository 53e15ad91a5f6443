"""Spreads independent tasks over the workers: adapters, statistics on models, scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergecore.checkpoints.folded import FoldedTensors
from mergecore.errors import ServiceError
from mergecore.events import Event
from mergecore.execution.adapters import AdapterTask, make_adapter
from mergecore.execution.model_runs import ModelTask, run_on_models
from mergecore.execution.outcome import Done, failed
from mergecore.execution.place import Place
from mergecore.execution.scoring import Bench
from mergecore.execution.tensor_ids import drawn_with, with_tensors_ids
from mergecore.planning.pool import opened
from mergecore.planning.work import AdapterWork, ModelWork


@dataclass(frozen=True)
class Job:
    """What is done with every task. shared: what all tasks share. shown_as: what progress calls it. at_once: how many
    may run at a time; None: as many as there are workers.
    """

    function: Callable[[Any, Any], Done]
    shared: Bench | Path
    shown_as: str
    at_once: int | None = None


def run_adapters(place: Place, works: Sequence[AdapterWork]) -> Done:
    """Make adapters of adapters."""
    members, base, tasks = {member.id: member for member in place.pool.members}, place.pool.base.tensors, []
    for work in works:
        experts = {expert: members[expert].adapter(place.folders[expert], base) for expert in work.experts}
        if "tensors" in work.method.drawn_by:
            experts = with_tensors_ids(place, experts)
        configs = tuple(members[expert].snapshot.config for expert in work.experts)
        tasks.append(AdapterTask(work, tuple(experts.values()), base, configs, drawn_with(place, [work])))
    job = Job(make_adapter, place.store.root, "adapters made")
    return spread(place, job, tasks, [work.step.name for work in works])


def run_model_works(place: Place, works: Sequence[ModelWork]) -> Done:
    """Work out statistics on models. As many run at once as the memory of a pass has room for."""
    pool_base, experts = opened(place.pool, place.folders)
    companions = place.pool.base
    tasks = [
        ModelTask(
            work,
            FoldedTensors(pool_base, experts[work.base]) if work.base else pool_base,
            tuple(experts[expert] for expert in work.experts),
            place.folders[companions.weights],
            companions.companions,
            place.memory,
        )
        for work in works
    ]
    at_once = None
    if place.memory is not None:
        largest = max(work.statistic.memory(work.selection, len(work.experts)) for work in works)
        at_once = max(1, place.memory // max(largest, 1))
    job = Job(run_on_models, place.bench, "statistics on data", at_once)
    return spread(place, job, tasks, [work.step.name for work in works])


def spread(place: Place, job: Job, tasks: Sequence[Any], names: Sequence[str]) -> Done:
    """Carry out all tasks on the workers. Where workers die, the rest is done alone, which shows the task that kills
    them.
    """
    done, waiting = Done(), dict(enumerate(tasks))
    place.report(Event(job.shown_as, 0, len(tasks), "models"))
    try:
        for position, outcome in place.executor.each(job.function, job.shared, tasks, job.at_once):
            done = done.note(outcome)
            del waiting[position]
            told = f"{job.shown_as}: {names[position]}"
            place.report(Event(told, len(tasks) - len(waiting), len(tasks), "models"))
    except ServiceError as error:
        if len(tasks) == 1:
            return failed(place.store, tasks[0].steps, error)
        for position, task in waiting.items():
            done = done.note(spread(place, job, [task], [names[position]]))
    return done

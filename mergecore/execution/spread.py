"""Spreads independent tasks over the workers: adapters, statistics on models, scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergecore.errors import ServiceError
from mergecore.events import Event
from mergecore.execution.adapters import AdapterTask, make_adapter
from mergecore.execution.outcome import Done, failed
from mergecore.execution.place import Place
from mergecore.execution.scoring import Bench, ModelTask, run_on_model
from mergecore.execution.tensor_ids import drawn_with, with_tensors_ids
from mergecore.planning.pool import opened
from mergecore.planning.work import AdapterWork, ModelWork


@dataclass(frozen=True)
class Job:
    """What is done with every task. shared: what all tasks share. shown_as: what progress calls it."""

    function: Callable[[Any, Any], Done]
    shared: Bench | Path
    shown_as: str


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


def run_on_models(place: Place, works: Sequence[ModelWork]) -> Done:
    """Work out statistics that run an expert on data."""
    base, experts = opened(place.pool, place.folders)
    companions = place.pool.base
    tasks = [
        ModelTask(work, base, experts[work.experts[0]], place.folders[companions.weights], companions.companions)
        for work in works
    ]
    job = Job(run_on_model, place.bench, "statistics on data")
    return spread(place, job, tasks, [work.step.name for work in works])


def spread(place: Place, job: Job, tasks: Sequence[Any], names: Sequence[str]) -> Done:
    """Carry out all tasks on the workers. Where workers die, the rest is done alone, which shows the task that kills
    them.
    """
    done, waiting = Done(), dict(enumerate(tasks))
    place.report(Event(job.shown_as, 0, len(tasks), "models"))
    try:
        for position, outcome in place.executor.each(job.function, job.shared, tasks):
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

"""Spreads independent tasks over the workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mergecore.errors import ServiceError
from mergecore.events import Event
from mergecore.execution.adapters import AdapterTask, make_adapter
from mergecore.execution.outcome import Done, failed
from mergecore.execution.place import Place
from mergecore.execution.scoring import Bench
from mergecore.planning.plans import StatisticPlan


def run_adapters(place: Place, plans: Sequence[StatisticPlan]) -> Done:
    """Make adapters of adapters."""
    members, base = {member.id: member for member in place.pool.members}, place.pool.base.tensors
    tasks = [
        AdapterTask(
            plan,
            tuple(members[one].adapter(place.folders[one], base) for one in plan.experts),
            base,
            tuple(members[one].snapshot.config for one in plan.experts),
        )
        for plan in plans
    ]
    return _gather(place, make_adapter, place.store.root, tasks, [plan.step.name for plan in plans], "adapters made")


def _gather(
    place: Place,
    function: Callable[[Any, Any], Done],
    bench: Bench | Path,
    tasks: Sequence[Any],
    names: Sequence[str],
    what: str,
) -> Done:
    """All tasks, spread; where workers die at one of them those that are left are done alone, to find out at which."""
    done, left = Done(), dict(enumerate(tasks))
    place.report(Event(what, 0, len(tasks), "models"))
    try:
        for position, found in place.executor.each(function, bench, tasks):
            done = done.note(found)
            del left[position]
            place.report(Event(f"{what}: {names[position]}", len(tasks) - len(left), len(tasks), "models"))
    except ServiceError as error:
        if len(tasks) == 1:
            return failed(place.store, tasks[0].steps, error)
        for position, task in left.items():
            done = done.note(_gather(place, function, bench, [task], [names[position]], what))
    return done

"""Scores models, and runs experts on data."""

from __future__ import annotations

from collections.abc import Sequence

from mergecore.execution.outcome import Done
from mergecore.execution.place import Place
from mergecore.execution.scoring import DataTask, ScoreTask, find_on_data, score_model
from mergecore.execution.spread import _gather
from mergecore.formats.masks_product import task_model
from mergecore.planning.cells import Scoring
from mergecore.planning.plans import StatisticPlan
from mergecore.planning.pool import opened
from mergecore.store.results import open_model
from mergecore.tensors.source import TensorSource


def run_scorings(place: Place, scorings: Sequence[Scoring]) -> Done:
    """Score models, one after another on each worker; a model's tasks stay together."""
    tasks, names = [], []
    for scoring in scorings:
        companions = place.pool.base if scoring.cell.merge is not None else place.pool.base.as_stored
        weights: TensorSource
        if scoring.cell.loads:
            found = _product_tasks(place, scoring)
            tasks += found
            names += [scoring.cell.name] * len(found)
            continue
        if scoring.cell.merge is not None:
            weights = open_model(place.store, scoring.cell.model)
        else:
            if scoring.cell.member is not None:
                companions = scoring.cell.member.snapshot.as_stored
            weights = companions.open(place.folders[companions.weights])
        tasks.append(ScoreTask(weights, place.folders[companions.weights], companions.companions, scoring.tasks))
        names.append(scoring.cell.name)
    return _gather(place, score_model, place.bench, tasks, names, "models scored")


def _product_tasks(place: Place, scoring: Scoring) -> list[ScoreTask]:
    """A product's scorings, one for each expert whose model is loaded from it."""
    merge, base = scoring.cell.merge, place.pool.base
    assert merge is not None
    weights, loads = open_model(place.store, merge.step), scoring.cell.loads
    return [
        ScoreTask(
            task_model(merge, weights, expert),
            place.folders[base.weights],
            base.companions,
            tuple(one for one in scoring.tasks if loads[one[1].task] == expert),
        )
        for expert in dict.fromkeys(loads[identity.task] for _, identity, _ in scoring.tasks)
    ]


def run_data_statistics(place: Place, plans: Sequence[StatisticPlan]) -> Done:
    """Work out statistics that run an expert on data."""
    base, experts = opened(place.pool, place.folders)
    ground = place.pool.base
    tasks = [
        DataTask(plan, base, experts[plan.experts[0]], place.folders[ground.weights], ground.companions)
        for plan in plans
    ]
    return _gather(place, find_on_data, place.bench, tasks, [plan.step.name for plan in plans], "statistics on data")

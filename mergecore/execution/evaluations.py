"""Scores models."""

from __future__ import annotations

from collections.abc import Sequence

from mergecore.errors import MergeloomError
from mergecore.execution.outcome import Done
from mergecore.execution.place import Place
from mergecore.execution.scoring import Scored, ScoreTask, score_model
from mergecore.execution.spread import Job, spread
from mergecore.formats.finished import finished_merge
from mergecore.planning.cells import Scoring
from mergecore.planning.work import MergeWork
from mergecore.store.results import open_model
from mergecore.store.store import State


def run_scorings(place: Place, scorings: Sequence[Scoring]) -> Done:
    """Score models, one after another on each worker; a model's tasks stay together."""
    tasks, names = [], []
    for scoring in scorings:
        merge = scoring.cell.merge
        own = [_checkpoint(place, scoring)] if merge is None else _merged(place, scoring, merge)
        tasks += own
        names += [scoring.cell.name] * len(own)
    return spread(place, Job(score_model, place.bench, "models scored"), tasks, names)


def _checkpoint(place: Place, scoring: Scoring) -> ScoreTask:
    """Return the scoring of a checkpoint as it stands."""
    member = scoring.cell.member
    snapshot = (place.pool.base if member is None else member.snapshot).as_stored
    folder = place.folders[snapshot.weights]
    return ScoreTask(snapshot.open(folder), folder, snapshot.companions, scoring.tasks)


def _merged(place: Place, scoring: Scoring, merge: MergeWork) -> list[ScoreTask]:
    """Return the scorings of a merge: one, or one for each expert whose model is loaded from the product.

    None where its bytes are gone: another run of the sweep has measured and dropped it since this round was planned.
    """
    base, loads = place.pool.base, scoring.cell.loads
    folder, model = place.folders[base.weights], merge.step
    try:
        weights = open_model(place.store, model)
        if not loads:
            return [ScoreTask(weights, folder, base.companions, scoring.tasks, model)]
        contents = finished_merge(place.store, place.pool, merge)
        by_expert: dict[str, list[Scored]] = {}
        for scored in scoring.tasks:
            by_expert.setdefault(loads[scored[1].task], []).append(scored)
        return [
            ScoreTask(merge.product.load(contents, weights, expert), folder, base.companions, tuple(tasks), model)
            for expert, tasks in by_expert.items()
        ]
    except (MergeloomError, OSError):
        if place.store.state(model) is State.PRESENT:
            raise
        return []

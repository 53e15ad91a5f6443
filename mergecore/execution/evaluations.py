"""Scores models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mergecore.execution.outcome import Done
from mergecore.execution.place import Place
from mergecore.execution.scoring import ScoreTask, score_model
from mergecore.execution.spread import Job, spread
from mergecore.formats.finished import finished_merge
from mergecore.planning.cells import Scoring
from mergecore.planning.work import MergeWork
from mergecore.store.results import open_model


def run_scorings(place: Place, scorings: Sequence[Scoring]) -> Done:
    """Score models, one after another on each worker; a model's tasks stay together."""
    tasks, names = [], []
    for scoring in scorings:
        merge = scoring.cell.merge
        own = [_checkpoint(place, scoring)] if merge is None else list(_merged(place, scoring, merge))
        tasks += own
        names += [scoring.cell.name] * len(own)
    return spread(place, Job(score_model, place.bench, "models scored"), tasks, names)


def _checkpoint(place: Place, scoring: Scoring) -> ScoreTask:
    """Return the scoring of a checkpoint as it stands."""
    member = scoring.cell.member
    snapshot = (place.pool.base if member is None else member.snapshot).as_stored
    folder = place.folders[snapshot.weights]
    return ScoreTask(snapshot.open(folder), folder, snapshot.companions, scoring.tasks)


def _merged(place: Place, scoring: Scoring, merge: MergeWork) -> Iterator[ScoreTask]:
    """Yield the scorings of a merge: one, or one for each expert whose model is loaded from the product."""
    base, weights, loads = place.pool.base, open_model(place.store, merge.step), scoring.cell.loads
    folder = place.folders[base.weights]
    if not loads:
        yield ScoreTask(weights, folder, base.companions, scoring.tasks)
        return
    contents = finished_merge(place.store, place.pool, merge)
    for expert in dict.fromkeys(loads[identity.task] for _, identity, _ in scoring.tasks):
        tasks = tuple(task for task in scoring.tasks if loads[task[1].task] == expert)
        yield ScoreTask(merge.product.load(contents, weights, expert), folder, base.companions, tasks)

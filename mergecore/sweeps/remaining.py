"""What is still to do. It is worked out anew from the store after every round.

Work is pulled from the outputs: a sweep asks for scores. A model is made only while a score of it is missing, and is
dropped as soon as nothing can need it. Nothing here does any work, or remembers what the store does not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from mergecore.events import Event
from mergecore.planning.cells import Cell, Plan, PlannedSearch, Scoring
from mergecore.planning.work import MergeWork, Work
from mergecore.plugins.search import Answer, NoScore, Score
from mergecore.reporting.scores import Trajectory
from mergecore.store.store import State, Store
from mergecore.sweeps.choice import Choice
from mergecore.sweeps.dropping import droppable_works
from mergecore.sweeps.search_growth import Growth
from mergecore.sweeps.store_view import StoreView


@dataclass(frozen=True)
class Round:
    """Work that can be done now, side by side. It is empty where nothing is missing."""

    statistics: tuple[Work, ...] = ()
    """What must be known for models; its own inputs are at hand."""
    merges: tuple[Work, ...] = ()
    """Models, or what is published in their place."""
    scorings: tuple[Scoring, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.statistics or self.merges or self.scorings)


@dataclass
class Frontier:
    """The plan held against the store, as it was at the last `refresh`.

    `round`, `droppable` and `summary` look at the store first. The plan then has the cells that its searches ask for by
    the
    scores that are known. room: how many models may lie in the store before more are merged.
    """

    plan: Plan
    store: Store
    room: int
    view: StoreView = field(init=False, repr=False)
    choice: Choice = field(init=False, repr=False)
    _growth: Growth = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._growth = Growth(self.plan)
        self.view = StoreView(self.plan, self.store)
        self.choice = Choice(self.plan, self.view, self._growth)
        self.refresh()

    def refresh(self) -> None:
        """Look at the store again, and let searches go on by what is known now."""
        self.view.refresh()
        self.choice.refresh(self.plan.cells)
        if self.plan.searches:
            self.plan = self._growth.grown(self._answer)
            self.choice.refresh(self.plan.cells)

    def _answer(self, planned: PlannedSearch, cell: Cell) -> Answer:
        """Return what is known of a search's cell: its score on validation items.

        The score is rounded, so that the order in which tasks are added up does not decide between equals.
        """
        if not self.view.measured(cell, "validation"):
            # Not `trouble`: what happens on test items, to this cell or to another of the same model, decides nothing.
            reason = cell.refused or self.view.failure(cell, ("validation",))
            return NoScore(reason) if reason else None
        known = ((task, self.view.score(cell, "validation", task)) for task in cell.tasks_on("validation"))
        scores = {task: score for task, score in known if score is not None}
        named = [scores[task] for task in planned.entry.search.tasks if task in scores]
        if not (named or any(task in scores for tasks in self.choice.side.values() for task in tasks)):
            return NoScore("it is measured on none of the tasks that decide")
        mean = fmean(named) if named else self.choice.selection_score(cell, "validation")
        return Score(round(mean, 12), scores)

    def trajectories(self) -> tuple[Trajectory, ...]:
        """Return the trajectory of each search, as of the last refresh."""
        return tuple(self._growth.trajectories())

    def round(self) -> Round:
        """Return everything that can be done now. Models at hand are scored while the next ones are made."""
        self.refresh()
        scorings, missing, present, asked = [], dict[str, MergeWork](), 0, set[str]()
        for cell in self.plan.cells:
            if self.view.trouble(cell):
                continue
            # Another cell may have the same model: what a search asks for is a cell of its own.
            tasks = tuple(task for task in self.choice.wanted(cell) if task[2].key not in asked)
            if not tasks:
                continue
            if cell.merge is None or self.view.state(cell.model) is State.PRESENT:
                scorings.append(Scoring(cell, tasks))
                asked.update(step.key for _, _, step in tasks)
                present += cell.merge is not None
            else:
                missing[cell.model.key] = cell.merge
        room = max(self.room - present, 1 if not scorings else 0)
        statistics, merges = self._ready(tuple(missing.values()), room)
        return Round(statistics, merges, tuple(scorings))

    def making(self, works: Sequence[Work]) -> Round:
        """Return what must be done next so that these works are PRESENT."""
        self.refresh()
        missing = [work for work in works if self.view.state(work.step) is not State.PRESENT]
        return Round(*self._ready(missing, len(missing)))

    def _ready(self, missing: Sequence[Work], room: int) -> tuple[tuple[Work, ...], tuple[Work, ...]]:
        """Return statistics whose inputs are known (for all models at once), and the first models that need nothing
        more.
        """
        at_hand = self.view.at_hand
        open_works = {work.step.key: work for model in missing for work in model.missing_inputs(at_hand)}
        statistics = tuple(
            work
            for work in open_works.values()
            if not any(inner.step.key in open_works for group in work.inputs.values() for inner in group)
        )
        ready = [model for model in missing if next(model.missing_inputs(at_hand), None) is None]
        return statistics, tuple(ready[:room])

    def droppable(self, settled: bool = False) -> list[Work]:
        """Return models in the store that nothing can ask for any more, and links of chains that have gone on.

        settled: the winner is registered, so that only it, and no runner-up by another average, is the registered one.
        """
        self.refresh()
        return droppable_works(self.plan.cells, self.choice, settled)


def summary(frontier: Frontier) -> Mapping[str, int]:
    """Return how many cells are done, pending, failed and refused."""
    frontier.refresh()
    counts = {"done": 0, "pending": 0, "failed": 0, "refused": 0}
    for cell in frontier.plan.cells:
        if cell.refused:
            counts["refused"] += 1
        elif frontier.view.trouble(cell):
            counts["failed"] += 1
        else:
            counts["pending" if frontier.choice.is_wanted(cell) else "done"] += 1
    return counts


def cells_so_far(frontier: Frontier) -> Event:
    """Return how many of the sweep's cells need no more work, as an event to report after each round."""
    counts = summary(frontier)
    total = sum(counts.values())
    return Event("whole sweep", total - counts["pending"], total, "cells")

"""What is still to be done: work pulled from the outputs, worked out anew from the store after every round.

A sweep asks for scores; a model is made only while a score of it is missing, and is dropped as soon as it can no longer
be needed. Nothing here does any work or remembers anything that the store does not hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from mergecore.identity.keys import Step
from mergecore.planning.cells import Cell, Plan, PlannedSearch, Scoring
from mergecore.planning.plans import MergePlan, StatisticPlan
from mergecore.plugins.chain import BEFORE, Link
from mergecore.plugins.evaluator import Split, TaskIdentity
from mergecore.plugins.search import Answer, NoScore, Score
from mergecore.plugins.statistic import DataStatistic
from mergecore.reporting.scores import Trajectory
from mergecore.store.store import State, Store
from mergecore.sweeps.registration_record import read_registration
from mergecore.sweeps.search_growth import Growth


@dataclass(frozen=True)
class Round:
    """Work that can be done now, side by side. Empty where nothing is missing."""

    statistics: tuple[StatisticPlan, ...] = ()
    """Streamed statistics, completed in one pass."""
    data: tuple[StatisticPlan, ...] = ()
    """Statistics that run a model on data, one piece of work each."""
    merges: tuple[MergePlan, ...] = ()
    """Models, completed in one pass."""
    scorings: tuple[Scoring, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.statistics or self.data or self.merges or self.scorings)


@dataclass
class Look:
    """One look at the store, and what was concluded from it; the next look begins anew.

    there: by kind of step, the names of the folders that were there. A step without one is missing, and nothing needs to
    be asked about it. winners: what `Frontier.chosen` found for each group.
    """

    failed: Mapping[str, str] = field(default_factory=dict)
    there: dict[str, frozenset[str]] = field(default_factory=dict)
    troubles: dict[str, str] = field(default_factory=dict)
    winners: dict[tuple[str, int, int], str | None] = field(default_factory=dict)
    at_hand: dict[str, bool] = field(default_factory=dict)


@dataclass
class Frontier:
    """The plan held against the store, as it was at the last `refresh`. Steps once seen done are not looked at again.

    Whatever goes over the whole plan (`round`, `droppable`, `summary` …) looks anew before it does; the plan then has the
    cells that its searches ask for by the scores known.
    room: how many models may lie in the store at once before more are merged.
    """

    plan: Plan
    store: Store
    room: int
    _done: set[str] = field(default_factory=set)
    _scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    _groups: dict[tuple[str, int, int], list[Cell]] = field(default_factory=dict)
    _look: Look = field(default_factory=Look)
    _growth: Growth = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._growth = Growth(self.plan)
        self._gather()
        self.refresh()

    def _gather(self) -> None:
        self._groups.clear()
        for cell in self.plan.cells:
            self._groups.setdefault(cell.group, []).append(cell)

    # --- what the store knows -----------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Look anew at what was done, dropped and failed, by this process or another; let searches go on by it."""
        self._look = Look(self.store.failures())
        if self.plan.searches:
            self.plan = self._growth.grown(self._answer)
            self._gather()

    def _answer(self, planned: PlannedSearch, cell: Cell) -> Answer:
        """What is known of a search's cell: its score on validation items, rounded so that the order in which tasks are
        added up does not decide between equals."""
        if not self.measured(cell, "validation"):
            # Not `trouble`: what happens on test items, to this cell or to another of the same model, decides nothing.
            reason = cell.refused or next(filter(None, map(self.failed, self._steps(cell, ("validation",)))), "")
            return NoScore(reason) if reason else None
        held = {
            task: self._scores[self.plan.evaluation(cell, "validation", task).key][0]
            for task in cell.tasks_on("validation")
        }
        named = [held[task] for task in planned.entry.search.tasks if task in held]
        if not (named or any(task in held for tasks in self._side().values() for task in tasks)):
            return NoScore("it is measured on none of the tasks that decide")
        return Score(round(fmean(named) if named else self.selection_score(cell, "validation"), 12), held)

    def trajectories(self) -> tuple[Trajectory, ...]:
        """The way of each search, as of the last look."""
        return tuple(self._growth.trajectories())

    def _there(self, step: Step) -> bool:
        """Whether the store had a folder for the step: one listing for thousands of questions."""
        there = self._look.there
        if step.kind not in there:
            there[step.kind] = self.store.names(step.kind)
        return bool(there[step.kind]) and step.name in there[step.kind]

    def state(self, step: Step) -> State:
        """What the store knows of a step."""
        return self.store.state(step) if self._there(step) else State.MISSING

    def done(self, step: Step) -> bool:
        """Whether the step's result is known (its bytes may have been dropped)."""
        if not self._there(step):
            return False
        if step.key not in self._done:
            state, record = self.store.found(step)
            if record is None or state not in (State.PRESENT, State.DROPPED):
                return False
            self._done.add(step.key)
            if step.kind == "evaluation":
                self._scores[step.key] = float(record.result["score"]), float(record.made.get("seconds", 0.0))
        return True

    def failed(self, step: Step) -> str:
        """Why a step failed, '' where it has not."""
        return self._look.failed.get(step.key, "")

    def score(self, cell: Cell, split: Split, task: str) -> float | None:
        """The cell's mean primary metric on a task, None while it is not known."""
        step = self.plan.evaluation(cell, split, task)
        return self._scores[step.key][0] if self.done(step) else None

    def seconds(self, step: Step) -> float:
        """How long an evaluation that is done has taken."""
        return self._scores[step.key][1]

    def trouble(self, cell: Cell) -> str:
        """Why the cell cannot be had: refused, or a step of it failed; '' where nothing stands against it."""
        if cell.refused or not self._look.failed:
            return cell.refused
        if cell.id not in self._look.troubles:
            self._look.troubles[cell.id] = next(filter(None, map(self.failed, self._steps(cell, self.plan.splits))), "")
        return self._look.troubles[cell.id]

    def _steps(self, cell: Cell, splits: Sequence[Split]) -> Iterator[Step]:
        """Every step the cell needs to be measured on these splits, in the order in which they are done."""
        if cell.merge is not None:
            for statistic in cell.merge.needed:
                yield statistic.step
            yield cell.model
        for split in splits:
            for task in cell.tasks_on(split):
                yield self.plan.evaluation(cell, split, task)

    # --- choosing -----------------------------------------------------------------------------------------------

    def measured(self, cell: Cell, split: Split) -> bool:
        """Whether all of the cell's tasks are scored."""
        return all(self.score(cell, split, task) is not None for task in cell.tasks_on(split))

    def selection_score(self, cell: Cell, split: Split) -> float:
        """What values are chosen by: the mean over categories of the mean over tasks, of the spec's side."""
        means = []
        for tasks in self._side().values():
            held = [self.score(cell, split, task) for task in tasks if task in cell.tasks_on(split)]
            known = [value for value in held if value is not None]
            if known:
                means.append(fmean(known))
        return fmean(means) if means else 0.0

    def _side(self) -> Mapping[str, tuple[str, ...]]:
        """Category → tasks of the side that decides."""
        register = self.plan.spec.output.register_
        return self.plan.suite.held_out if register and register.by == "held_out" else self.plan.suite.held_in

    def chosen(self, cell: Cell) -> bool | None:
        """Whether the cell's values won its group; None while that is open. Always true without validation items."""
        if "validation" not in self.plan.splits or cell.kind != "merge":
            return True
        winners = self._look.winners
        if cell.group not in winners:
            winners[cell.group] = self._winner(cell.group)
        winner = winners[cell.group]
        return None if winner is None else winner in ("", cell.id)

    def _winner(self, group: tuple[str, int, int]) -> str | None:
        """The cell whose values won, '' where there is nothing to choose from, None while that is open."""
        if group in self._growth.runs:
            return self._growth.result(group)
        rivals = [other for other in self._groups[group] if not self.trouble(other)]
        if len(rivals) <= 1 or not any(other.deciding for other in rivals):
            return ""
        if not all(self.measured(other, "validation") for other in rivals):
            return None
        return max(rivals, key=self._on_validation).id

    def _on_validation(self, cell: Cell) -> tuple[float, str]:
        """What cells of a group are ranked by."""
        return self.selection_score(cell, "validation"), cell.id

    def wanted(self, cell: Cell) -> Iterator[tuple[Split, TaskIdentity, Step]]:
        """The scores that are asked for now and not known: validation first, test items for winners only."""
        for split in self.plan.splits:
            if split == "test" and not self.chosen(cell):
                return
            for task in cell.tasks_on(split):
                step = self.plan.evaluation(cell, split, task)
                if not self.done(step):
                    yield split, self.plan.tasks[split][task], step

    # --- the next round -----------------------------------------------------------------------------------------

    def round(self) -> Round:
        """Everything that can be done now. Evaluations of models at hand and the making of the next ones go together."""
        self.refresh()
        scorings, missing, present, asked = [], dict[str, MergePlan](), 0, set[str]()
        for cell in self.plan.cells:
            if self.trouble(cell):
                continue
            # Another cell may have the same model: what a search asks for is a cell of its own.
            tasks = tuple(one for one in self.wanted(cell) if one[2].key not in asked)
            if not tasks:
                continue
            if cell.merge is None or self.state(cell.model) is State.PRESENT:
                scorings.append(Scoring(cell, tasks))
                asked.update(step.key for _, _, step in tasks)
                present += cell.merge is not None
            else:
                missing[cell.model.key] = cell.merge
        statistics, data, merges = self._ready(
            tuple(missing.values()), max(self.room - present, 1 if not scorings else 0)
        )
        return Round(statistics, data, merges, tuple(scorings))

    def making(self, merges: Sequence[MergePlan]) -> Round:
        """What must be done next for these models to be PRESENT."""
        self.refresh()
        missing = [merge for merge in merges if self.state(merge.step) is not State.PRESENT]
        statistics, data, ready = self._ready(missing, len(missing))
        return Round(statistics, data, ready)

    def _ready(
        self, missing: Sequence[MergePlan], room: int
    ) -> tuple[tuple[StatisticPlan, ...], tuple[StatisticPlan, ...], tuple[MergePlan, ...]]:
        """Statistics whose own inputs are known (for all models at once), and the first models that need no more."""
        open_ones = {plan.step.key: plan for merge in missing for plan in merge.missing(self.at_hand)}
        streamed: list[StatisticPlan] = []
        with_data: list[StatisticPlan] = []
        for plan in open_ones.values():
            if not any(inner.step.key in open_ones for group in plan.inputs.values() for inner in group):
                (with_data if isinstance(plan.statistic, DataStatistic) else streamed).append(plan)
        ready = [merge for merge in missing if not any(True for _ in merge.missing(self.at_hand))]
        return tuple(streamed), tuple(with_data), tuple(ready[:room])

    def at_hand(self, plan: StatisticPlan) -> bool:
        """Whether a statistic's bytes are there to be read."""
        known = self._look.at_hand
        if plan.step.key not in known:
            known[plan.step.key] = self.state(plan.step) is State.PRESENT
        return known[plan.step.key]

    # --- dropping -----------------------------------------------------------------------------------------------

    def droppable(self, settled: bool = False) -> list[MergePlan | StatisticPlan]:
        """Models in the store that nothing can ask for any more: measured, and beaten or not to be kept; and links of
        chains that have gone on, which no model that is still to be made asks for.

        settled: the winner is registered, so that only it, and no runner-up by another average, is the registered one.
        """
        keep = self.plan.spec.output.keep
        if keep == "all":
            return []
        self.refresh()
        held = [cell for cell in self.plan.cells if cell.merge and self.state(cell.model) is State.PRESENT]
        found = read_registration(self.store, self.plan.spec.name, {cell.id for cell in self.plan.cells})
        registered = str(found["cell"]) if found else ""
        best = self._best() if held else set[str]()
        needed: set[str] = set()
        for cell in held:
            if not self.trouble(cell) and self._still_needed(cell, registered, settled, best):
                needed.add(cell.model.key)
        return [*(cell.merge for cell in held if cell.merge and cell.model.key not in needed), *self._passed_links()]

    def _passed_links(self) -> list[StatisticPlan]:
        """Links at hand behind which the chain has gone on. Its last link stays: an expert who comes later joins there."""
        passed: dict[str, StatisticPlan] = {}
        asked: set[str] = set()
        for cell in self.plan.cells:
            if cell.merge is None:
                continue
            links = [plan for plan in cell.merge.needed if isinstance(plan.statistic, Link)]
            for plan in links:
                if self.done(plan.step):
                    passed.update((before.step.key, before) for before in plan.inputs[BEFORE])
            if not links or self.trouble(cell) or not any(True for _ in self.wanted(cell)):
                continue
            if self.state(cell.model) is not State.PRESENT:
                asked.update(plan.step.key for plans in cell.merge.statistics.values() for plan in plans)
                for missing in cell.merge.missing(self.at_hand):
                    asked.update(plan.step.key for plan in missing.inputs.get(BEFORE, ()))
        return [plan for key, plan in passed.items() if key not in asked and self.at_hand(plan)]

    def _best(self) -> set[str]:
        """The cells that would be kept if nothing more came: the best of all, or where `keep` says so of each method."""
        split: Split = self.plan.splits[0]
        best: dict[str, tuple[float, str]] = {}
        for cell in self.plan.cells:
            if cell.kind != "merge" or self.trouble(cell) or not self.chosen(cell) or not self.measured(cell, "test"):
                continue
            place = cell.method if self.plan.spec.output.keep == "best" else ""
            rank = (-round(self.selection_score(cell, split), 12), cell.id)
            best[place] = min(best.get(place, rank), rank)
        return {cell for _, cell in best.values()}

    def _still_needed(self, cell: Cell, registered: str, settled: bool, best: set[str]) -> bool:
        if any(True for _ in self.wanted(cell)):
            return True
        chosen = self.chosen(cell)
        if chosen is None:  # its group is still being measured: only the best so far can become the winner
            if cell.group in self._growth.runs and (best_so_far := self._growth.best(cell.group)):
                return cell.id == best_so_far
            rivals = [other for other in self._groups[cell.group] if self.measured(other, "validation")]
            return cell is max(rivals, key=self._on_validation)
        keep = self.plan.spec.output.keep
        if not chosen or cell.kind != "merge" or keep == "none":
            return False
        if keep == "registered" and self.plan.spec.output.register_ is None:
            return False
        if keep == "registered" and cell.merge is not None and cell.merge.product != cell.model:
            return False  # its adapter is what is registered, and stays
        if keep == "registered" and registered and (settled or cell.id == registered):
            return cell.id == registered
        return cell.id in best


def summary(frontier: Frontier) -> Mapping[str, int]:
    """How many cells are done, pending, failed and refused."""
    frontier.refresh()
    found = {"done": 0, "pending": 0, "failed": 0, "refused": 0}
    for cell in frontier.plan.cells:
        if cell.refused:
            found["refused"] += 1
        elif frontier.trouble(cell):
            found["failed"] += 1
        else:
            found["pending" if any(True for _ in frontier.wanted(cell)) else "done"] += 1
    return found

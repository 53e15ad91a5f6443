"""What is still to be done: work pulled from the outputs, worked out anew from the store after every round.

A sweep asks for scores; a model is made only while a score of it is missing, and is dropped as soon as it can no longer
be needed. Nothing here does any work or remembers anything that the store does not hold.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from mergecore.evaluators import Split, TaskIdentity
from mergecore.identity import Step
from mergecore.method import DataStatistic
from mergecore.plan import Cell, MergePlan, Plan, StatisticPlan
from mergecore.store import State, Store


@dataclass(frozen=True)
class Scoring:
    """The tasks on which one cell's model is still to be scored."""

    cell: Cell
    tasks: tuple[tuple[Split, TaskIdentity, Step], ...]


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
class Frontier:
    """The plan held against the store. Steps once seen done are not looked at again.

    room: how many models may lie in the store at once before more are merged.
    """

    plan: Plan
    store: Store
    room: int
    _done: set[str] = field(default_factory=set)
    _failed: dict[str, str] = field(default_factory=dict)
    _scores: dict[str, float] = field(default_factory=dict)
    _groups: dict[tuple[str, int, int], list[Cell]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for cell in self.plan.cells:
            self._groups.setdefault(cell.group, []).append(cell)
        self.refresh()

    # --- what the store knows -----------------------------------------------------------------------------------

    def done(self, step: Step) -> bool:
        """Whether the step's result is known (its bytes may have been dropped)."""
        if step.key not in self._done and self.store.is_done(step):
            self._done.add(step.key)
        return step.key in self._done

    def failed(self, step: Step) -> str:
        """Why a step failed, '' where it has not."""
        return self._failed.get(step.key, "")

    def refresh(self) -> None:
        """Take note of what failed since the last look."""
        self._failed = self.store.failures()

    def score(self, cell: Cell, split: Split, task: str) -> float | None:
        """The cell's mean primary metric on a task, None while it is not known."""
        step = self.plan.evaluation(cell, split, task)
        if step.key not in self._scores:
            record = self.store.record(step) if self.done(step) else None
            if record is None:
                return None
            self._scores[step.key] = float(record.result["score"])
        return self._scores[step.key]

    def trouble(self, cell: Cell) -> str:
        """Why the cell cannot be had: refused, or a step of it failed; '' where nothing stands against it."""
        if cell.refused:
            return cell.refused
        if cell.merge is not None:
            for statistic in self._statistics(cell.merge):
                if reason := self.failed(statistic.step):
                    return reason
            if reason := self.failed(cell.model):
                return reason
        for split in self.plan.splits:
            for task in cell.tasks:
                if reason := self.failed(self.plan.evaluation(cell, split, task)):
                    return reason
        return ""

    # --- choosing -----------------------------------------------------------------------------------------------

    def measured(self, cell: Cell, split: Split) -> bool:
        """Whether all of the cell's tasks are scored."""
        return all(self.score(cell, split, task) is not None for task in cell.tasks)

    def selection_score(self, cell: Cell, split: Split) -> float:
        """What values are chosen by: the mean over categories of the mean over tasks, of the spec's side."""
        register = self.plan.spec.output.register_
        side = register.by if register else "held_in"
        groups = self.plan.suite.held_in if side == "held_in" else self.plan.suite.held_out
        means = []
        for tasks in groups.values():
            held = [self.score(cell, split, task) for task in tasks if task in cell.tasks]
            known = [value for value in held if value is not None]
            if known:
                means.append(fmean(known))
        return fmean(means) if means else 0.0

    def chosen(self, cell: Cell) -> bool | None:
        """Whether the cell's values won its group; None while that is open. Always true without validation items."""
        if "validation" not in self.plan.splits or cell.kind != "merge":
            return True
        rivals = [other for other in self._groups[cell.group] if not self.trouble(other)]
        if len(rivals) <= 1:
            return True
        if not all(self.measured(other, "validation") for other in rivals):
            return None
        best = max(rivals, key=lambda other: (self.selection_score(other, "validation"), other.id))
        return best.id == cell.id

    def wanted(self, cell: Cell) -> Iterator[tuple[Split, TaskIdentity, Step]]:
        """The scores that are asked for now and not known: validation first, test items for winners only."""
        for split in self.plan.splits:
            if split == "test" and not self.chosen(cell):
                return
            for task in cell.tasks:
                step = self.plan.evaluation(cell, split, task)
                if not self.done(step):
                    yield split, self.plan.tasks[split][task], step

    # --- the next round -----------------------------------------------------------------------------------------

    def round(self) -> Round:
        """Everything that can be done now. Evaluations of models at hand and the making of the next ones go together."""
        self.refresh()
        scorings, missing, present = [], dict[str, MergePlan](), 0
        for cell in self.plan.cells:
            if self.trouble(cell):
                continue
            tasks = tuple(self.wanted(cell))
            if not tasks:
                continue
            if cell.merge is None:
                scorings.append(Scoring(cell, tasks))
            elif self.store.state(cell.model) is State.PRESENT:
                scorings.append(Scoring(cell, tasks))
                present += 1
            else:
                missing[cell.model.key] = cell.merge
        statistics, data, merges = self._ready(
            tuple(missing.values()), max(self.room - present, 1 if not scorings else 0)
        )
        return Round(statistics, data, merges, tuple(scorings))

    def making(self, merges: Sequence[MergePlan]) -> Round:
        """What must be done next for these models to be PRESENT."""
        missing = [merge for merge in merges if self.store.state(merge.step) is not State.PRESENT]
        statistics, data, ready = self._ready(missing, len(missing))
        return Round(statistics, data, ready)

    def _ready(
        self, missing: Sequence[MergePlan], room: int
    ) -> tuple[tuple[StatisticPlan, ...], tuple[StatisticPlan, ...], tuple[MergePlan, ...]]:
        """Statistics whose own inputs are known (for all models at once), and the first models that need no more."""
        streamed: dict[str, StatisticPlan] = {}
        with_data: dict[str, StatisticPlan] = {}
        ready = []
        for merge in missing:
            open_ones = [plan for plan in self._statistics(merge) if not self._at_hand(plan)]
            for plan in open_ones:
                if all(self._at_hand(inner) for group in plan.inputs.values() for inner in group):
                    (with_data if isinstance(plan.statistic, DataStatistic) else streamed)[plan.step.key] = plan
            if not open_ones:
                ready.append(merge)
        return tuple(streamed.values()), tuple(with_data.values()), tuple(ready[:room])

    def _at_hand(self, plan: StatisticPlan) -> bool:
        return self.store.is_done(plan.step, bytes_needed=True)

    def _statistics(self, merge: MergePlan) -> Iterator[StatisticPlan]:
        for plans in merge.statistics.values():
            for plan in plans:
                yield from plan.with_inputs()

    # --- dropping -----------------------------------------------------------------------------------------------

    def droppable(self, settled: bool = False) -> list[MergePlan]:
        """Models in the store that nothing can ask for any more: measured, and beaten or not to be kept.

        settled: the winner is registered, so that only it, and no runner-up by another average, is the registered one.
        """
        keep = self.plan.spec.output.keep
        if keep == "all":
            return []
        held = [cell for cell in self.plan.cells if cell.merge and self.store.state(cell.model) is State.PRESENT]
        found = read_registration(self.store, self.plan.spec.name, {cell.id for cell in self.plan.cells})
        registered = str(found["cell"]) if found else ""
        needed: set[str] = set()
        for cell in held:
            if not self.trouble(cell) and self._still_needed(cell, registered, settled):
                needed.add(cell.model.key)
        return [cell.merge for cell in held if cell.merge and cell.model.key not in needed]

    def _still_needed(self, cell: Cell, registered: str, settled: bool) -> bool:
        if any(True for _ in self.wanted(cell)):
            return True
        chosen = self.chosen(cell)
        if chosen is None:  # its group is still being measured: only the best so far can become the winner
            rivals = [other for other in self._groups[cell.group] if self.measured(other, "validation")]
            return cell is max(rivals, key=lambda other: (self.selection_score(other, "validation"), other.id))
        keep = self.plan.spec.output.keep
        if not chosen or cell.kind != "merge" or keep == "none":
            return False
        if keep == "registered" and self.plan.spec.output.register_ is None:
            return False
        if keep == "registered" and registered and (settled or cell.id == registered):
            return cell.id == registered
        rivals = [
            other
            for other in self.plan.cells
            if other.kind == "merge" and not self.trouble(other) and self.chosen(other) and self.measured(other, "test")
            and (keep == "registered" or other.method == cell.method)
        ]  # fmt: skip
        split: Split = self.plan.splits[0]
        return cell is min(rivals, key=lambda other: (-round(self.selection_score(other, split), 12), other.id))


def registration_file(store: Store, sweep: str) -> Path:
    """Where the sweep's registration is recorded."""
    return store.root / "sweeps" / sweep / "registration.json"


def read_registration(store: Store, sweep: str, cells: set[str]) -> dict[str, Any] | None:
    """The registration record, None where there is none or its cell is no longer part of the sweep."""
    try:
        held = json.loads(registration_file(store, sweep).read_text())
    except (OSError, ValueError):
        return None
    return held if held.get("cell") in cells else None


def summary(frontier: Frontier) -> Mapping[str, int]:
    """How many cells are done, pending, failed and refused."""
    found = {"done": 0, "pending": 0, "failed": 0, "refused": 0}
    for cell in frontier.plan.cells:
        if cell.refused:
            found["refused"] += 1
        elif frontier.trouble(cell):
            found["failed"] += 1
        else:
            found["pending" if any(True for _ in frontier.wanted(cell)) else "done"] += 1
    return found

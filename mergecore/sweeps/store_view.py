"""What the store knows of a plan's steps, as of the last look."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mergecore.identity.keys import Step
from mergecore.planning.cells import Cell, Plan
from mergecore.planning.work import Work
from mergecore.plugins.evaluator import Split
from mergecore.store.store import State, Store


@dataclass
class Look:
    """One look at the store, and what was concluded from it.

    failed: {step key: reason}. folders: {kind of step: names of its folders}; a step without a folder is missing, and
    nothing more is asked about it. troubles: {cell id: reason}. at_hand: {step key: whether its bytes are there}.
    """

    failed: Mapping[str, str] = field(default_factory=dict)
    folders: dict[str, frozenset[str]] = field(default_factory=dict)
    troubles: dict[str, str] = field(default_factory=dict)
    at_hand: dict[str, bool] = field(default_factory=dict)


@dataclass
class StoreView:
    """The steps of a plan held against the store. A step that was seen done is not looked at again.

    plan: any state of the plan. Cells that searches add have steps like all others.
    """

    plan: Plan
    store: Store
    _done: set[str] = field(default_factory=set)
    _scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    _look: Look = field(default_factory=Look)

    def refresh(self) -> None:
        """Look again at what was done, dropped and failed, by this process or another."""
        self._look = Look(self.store.failures())

    def state(self, step: Step) -> State:
        """Return what the store knows of a step."""
        return self.store.state(step) if self._has_folder(step) else State.MISSING

    def _has_folder(self, step: Step) -> bool:
        """Return whether the store has a folder for the step. One listing answers thousands of questions."""
        folders = self._look.folders
        if step.kind not in folders:
            folders[step.kind] = self.store.names(step.kind)
        return bool(folders[step.kind]) and step.name in folders[step.kind]

    def done(self, step: Step) -> bool:
        """Return whether the step's result is known (its bytes may have been dropped)."""
        if not self._has_folder(step):
            return False
        if step.key not in self._done:
            state, record = self.store.state_and_record(step)
            if record is None or state not in (State.PRESENT, State.DROPPED):
                return False
            self._done.add(step.key)
            if step.kind == "evaluation":
                self._scores[step.key] = float(record.result["score"]), float(record.provenance.get("seconds", 0.0))
        return True

    def at_hand(self, work: Work) -> bool:
        """Return whether a work's bytes are there to be read."""
        known = self._look.at_hand
        if work.step.key not in known:
            known[work.step.key] = self.state(work.step) is State.PRESENT
        return known[work.step.key]

    def failed(self, step: Step) -> str:
        """Return why a step failed, '' where it has not."""
        return self._look.failed.get(step.key, "")

    def failure_path(self, cell: Cell) -> Path | None:
        """Return the path of the record of the failure that stops the cell; None where none does."""
        steps = self.steps(cell, self.plan.splits) if self._look.failed and not cell.refused else ()
        failed = next((step for step in steps if self.failed(step)), None)
        return None if failed is None else self.store.failure_path(failed.key)

    def trouble(self, cell: Cell) -> str:
        """Return why the cell has no result: it is refused, or one of its steps failed; '' where nothing stops it."""
        if cell.refused or not self._look.failed:
            return cell.refused
        if cell.id not in self._look.troubles:
            self._look.troubles[cell.id] = self.failure(cell, self.plan.splits)
        return self._look.troubles[cell.id]

    def failure(self, cell: Cell, splits: Sequence[Split]) -> str:
        """Return why the first step failed that the cell needs to be measured on these splits; '' where none has."""
        return next(filter(None, map(self.failed, self.steps(cell, splits))), "")

    def steps(self, cell: Cell, splits: Sequence[Split]) -> Iterator[Step]:
        """Yield every step that the cell needs to be measured on these splits, in the order in which they are done."""
        if cell.merge is not None:
            for work in cell.merge.needed:
                yield work.step
            yield cell.model
        for split in splits:
            for task in cell.tasks_on(split):
                yield self.plan.evaluation(cell, split, task)

    def score(self, cell: Cell, split: Split, task: str) -> float | None:
        """Return the cell's mean primary metric on a task, None while it is not known."""
        step = self.plan.evaluation(cell, split, task)
        return self._scores[step.key][0] if self.done(step) else None

    def seconds(self, step: Step) -> float:
        """Return how long an evaluation that is done has taken."""
        return self._scores[step.key][1]

    def measured(self, cell: Cell, split: Split) -> bool:
        """Return whether all of the cell's tasks are scored."""
        return all(self.score(cell, split, task) is not None for task in cell.tasks_on(split))

"""What is chosen by the scores: the values of each group, and with them the cells whose test items are opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from mergecore.identity.keys import Step
from mergecore.planning.cells import Cell, Plan
from mergecore.plugins.evaluator import Split, TaskIdentity
from mergecore.sweeps.search_growth import Growth
from mergecore.sweeps.store_view import StoreView

Group = tuple[str, int, int]


@dataclass
class Choice:
    """The choices of a plan. Cells of one group differ in their values. Validation items, or a search, choose one of
    them.
    """

    plan: Plan
    view: StoreView
    growth: Growth
    _groups: dict[Group, list[Cell]] = field(default_factory=dict)
    _winners: dict[Group, str | None] = field(default_factory=dict)

    def refresh(self, cells: Sequence[Cell]) -> None:
        """Forget what was chosen, and choose among these cells by what the store view sees now."""
        self._winners.clear()
        self._groups.clear()
        for cell in cells:
            self._groups.setdefault(cell.group, []).append(cell)

    @property
    def side(self) -> Mapping[str, tuple[str, ...]]:
        """{category: tasks} of the side that decides: held in, or held out."""
        register = self.plan.spec.output.register_
        return self.plan.suite.held_out if register and register.by == "held_out" else self.plan.suite.held_in

    def selection_score(self, cell: Cell, split: Split) -> float:
        """Return the mean over categories of the mean over tasks, on the side that decides. Values are chosen by it."""
        means = []
        for tasks in self.side.values():
            scores = [self.view.score(cell, split, task) for task in tasks if task in cell.tasks_on(split)]
            known = [score for score in scores if score is not None]
            if known:
                means.append(fmean(known))
        return fmean(means) if means else 0.0

    def chosen(self, cell: Cell) -> bool | None:
        """Return whether the cell's values won its group; None while that is open. True without validation items."""
        if "validation" not in self.plan.splits or cell.kind != "merge":
            return True
        if cell.group not in self._winners:
            self._winners[cell.group] = self._winner(cell.group)
        winner = self._winners[cell.group]
        return None if winner is None else winner in ("", cell.id)

    def _winner(self, group: Group) -> str | None:
        """Return the id of the cell whose values won, '' where there is no choice, None while it is open."""
        if group in self.growth.runs:
            return self.growth.result(group)
        rivals = [other for other in self._groups[group] if not self.view.trouble(other)]
        if len(rivals) <= 1 or not any(other.deciding for other in rivals):
            return ""
        if not all(self.view.measured(other, "validation") for other in rivals):
            return None
        return max(rivals, key=self._on_validation).id

    def leads(self, cell: Cell) -> bool:
        """Return whether the cell is the best measured one of its group so far."""
        if cell.group in self.growth.runs and (best_so_far := self.growth.best(cell.group)):
            return cell.id == best_so_far
        rivals = [other for other in self._groups[cell.group] if self.view.measured(other, "validation")]
        return cell is max(rivals, key=self._on_validation)

    def _on_validation(self, cell: Cell) -> tuple[float, str]:
        """Return what cells of a group are ranked by."""
        return self.selection_score(cell, "validation"), cell.id

    def wanted(self, cell: Cell) -> Iterator[tuple[Split, TaskIdentity, Step]]:
        """Yield the scores that are asked for now and not known: validation first, test items for winners only."""
        for split in self.plan.splits:
            if split == "test" and not self.chosen(cell):
                return
            for task in cell.tasks_on(split):
                step = self.plan.evaluation(cell, split, task)
                if not self.view.done(step):
                    yield split, self.plan.tasks[split][task], step

    def is_wanted(self, cell: Cell) -> bool:
        """Return whether any score of the cell is asked for now and not known."""
        return next(self.wanted(cell), None) is not None

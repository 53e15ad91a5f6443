"""Grows a plan by its searches. Each search is played as far as scores are known, and asks for more cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mergecore.planning.cells import Cell, Plan, PlannedSearch
from mergecore.plugins.search import Answer, Candidate, NoScore
from mergecore.reporting.scores import Trajectory, Trial, values_label
from mergecore.sweeps.search_progress import SearchState

Known = Callable[[PlannedSearch, Cell], Answer]
"""What is known of a search's cell."""


@dataclass
class Growth:
    """The searches of a plan. All of it can be played again from the scores."""

    planted: Plan
    """The plan without what searches have added."""

    def __post_init__(self) -> None:
        self.runs = {
            planned.group: (planned, SearchState(planned.entry.search, planned.ground))
            for planned in self.planted.searches
        }

    def grown(self, known: Known) -> Plan:
        """Return the plan with every cell that the searches ask for, by the scores that are known."""
        cells: dict[str, Cell] = {}
        for planned, run in self.runs.values():
            run.advance(lambda candidate, planned=planned: known(planned, self.cell(planned, candidate)))  # type: ignore[misc]
            for candidate in run.candidates:
                cell = self.cell(planned, candidate)
                cells.setdefault(cell.id, cell)
        return replace(self.planted, cells=(*self.planted.cells, *cells.values()))

    def cell(self, planned: PlannedSearch, candidate: Candidate) -> Cell:
        """Return the cell of a candidate."""
        assert self.planted.candidate is not None
        return self.planted.candidate(planned, candidate)

    def result(self, group: tuple[str, int, int]) -> str | None:
        """Return the id of the cell that the group's search ended with, 'none' where it ended with none, None while it
        goes on.
        """
        run = self.runs[group][1]
        return (self.best(group) or "none") if run.ended else None

    def best(self, group: tuple[str, int, int]) -> str:
        """Return the id of the best cell so far, '' while there is none."""
        planned, run = self.runs[group]
        return self.cell(planned, run.best).id if run.best is not None else ""

    def trajectories(self) -> Iterator[Trajectory]:
        """Yield the trajectory of each search so far."""
        for planned, run in self.runs.values():
            entry, trials = planned.entry, tuple(self._trials(planned, run))
            state = "open" if not run.ended else "stopped" if run.trouble else "done"
            yield Trajectory(
                planned.name, entry.label, entry.search.name, planned.count, planned.subset, state,  # type: ignore[arg-type]
                run.trouble, entry.search.most(planned.ground), self.best(planned.group) if run.ended else "", trials,
            )  # fmt: skip

    def _trials(self, planned: PlannedSearch, run: SearchState) -> Iterator[Trial]:
        best: float | None = None
        for number, round in enumerate(run.rounds, start=1):
            answers = list(zip(round.candidates, round.answers, strict=True))
            for candidate, answer in answers:
                score, reason = (None, answer.reason) if isinstance(answer, NoScore) else (answer.mean, "")
                best = max((known_score for known_score in (best, score) if known_score is not None), default=None)
                yield self._trial(planned, candidate, number, score, candidate == round.best, best, reason)
        for candidate in run.waiting:
            yield self._trial(planned, candidate, len(run.rounds) + 1, None, False, None, "")

    def _trial(
        self,
        planned: PlannedSearch,
        candidate: Candidate,
        number: int,
        score: float | None,
        kept: bool,
        best: float | None,
        reason: str,
    ) -> Trial:
        what = values_label(dict(candidate.values)) or " + ".join(candidate.experts)
        return Trial(number, self.cell(planned, candidate).id, what, score, kept, best, reason)

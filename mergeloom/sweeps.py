"""Sweeps from Python: plan one, run it, read its results."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]

from flows.cli.texts import plan_text
from flows.conduct import conduct
from flows.session.session import Session, open_session, session_of
from flows.session.settings import Options
from mergecore.errors import SpecError
from mergecore.events import Report, silent
from mergecore.planning.cells import Cell
from mergecore.spec.sweep import Spec, parse_spec
from mergecore.sweeps.cost import Cost
from mergecore.sweeps.measured import collect
from mergecore.sweeps.score_table import score_table

SpecLike = str | os.PathLike[str] | Mapping[str, Any] | Spec
"""The path of a spec file, its content as a mapping, or a parsed `Spec`. Relative paths in it start from the current
directory, as they do on the command line, wherever the file lies."""


@dataclass(frozen=True)
class PlannedCell:
    """One model of a sweep.

    cell: its id, the same when the spec is extended. kind: a baseline (the base, an expert, the multitask model) or a
    merge. method and values: empty for baselines. count: how many experts are merged. subset: number of the draw of
    experts, −1 for baselines. experts: their names. reason: why it is refused or failed, else ''.
    """

    cell: str
    kind: Literal["base", "expert", "multitask", "merge"]
    name: str
    method: str
    values: Mapping[str, Any]
    count: int
    subset: int
    experts: tuple[str, ...]
    state: Literal["done", "to do", "refused", "failed"]
    reason: str


@dataclass(frozen=True)
class StepsToDo:
    """How many steps of each kind the store lacks. 0 everywhere: the sweep is finished, but for its registration."""

    statistics: int
    merges: int
    evaluations: int

    @property
    def total(self) -> int:
        """The number of steps of all kinds."""
        return self.statistics + self.merges + self.evaluations


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep consists of, and what is left to do.

    cells: every model, baselines first. steps: what is missing. bytes_read, bytes_written: in all passes over the
    checkpoints. disk: the most bytes that models take at a time. peak_memory: bytes. seconds: the expected time.
    text: what `mergeloom plan` prints.
    """

    name: str
    cells: tuple[PlannedCell, ...]
    steps: StepsToDo
    bytes_read: int
    bytes_written: int
    disk: int
    peak_memory: int
    seconds: float
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class FailedCell:
    """A model without a result. status: 'refused' where its method does not fit the experts, else 'failed'."""

    cell: str
    name: str
    status: Literal["refused", "failed"]
    reason: str


@dataclass(frozen=True)
class SweepOutcome:
    """How a sweep ended.

    complete: every cell is done. summary: one line, '22 of 24 cells done, 2 refused'. report: Markdown. remarks: lines
    on what was written and where it can be seen. failed: the cells without a result. folder: where the tables (Parquet,
    CSV), report.md and the figure are.
    """

    name: str
    complete: bool
    summary: str
    report: str
    remarks: tuple[str, ...]
    failed: tuple[FailedCell, ...]
    folder: Path

    def __str__(self) -> str:
        return "\n".join([self.report, "", *self.remarks])

    def _repr_markdown_(self) -> str:
        return self.report


def plan(spec: SpecLike, *, workers: int | None = None, report: Report | None = None) -> SweepPlan:
    """Return what a sweep would do, and what that costs. Writes nothing.

    spec: see `SpecLike`. workers: how many are expected to share the work (None: as the spec says, else one a core).
    report: called with an `Event` while checkpoints are looked at, from any thread.

    Raises SpecError (a key or value that cannot be meant), SourceError (a checkpoint that cannot be had), MismatchError
    (checkpoints that do not fit each other), EvaluationError (a task that does not exist), StoreError (a store that
    cannot be written) and CapacityError (too little memory or disk). All are a MergeloomError.
    """
    session = _session(spec, report or silent, Options(workers=workers))
    costs = session.cost()
    session.check_fit(costs)
    return _described(session, costs)


def sweep(
    spec: SpecLike,
    *,
    in_process: bool = True,
    workers: int | None = None,
    retry_failed: bool = False,
    track: bool = False,
    report: Report | None = None,
) -> SweepOutcome:
    """Run a sweep, go on with it, or extend it: only what its store lacks is done.

    spec: see `SpecLike`. in_process: do the work in threads of this process; False: with Prefect, and in worker
    processes of Dask, which import the calling script again, so it needs `if __name__ == "__main__":`. workers: threads
    or worker processes (None: as the spec says, else one a core). retry_failed: try cells again that failed before.
    track: show the sweep in MLflow; a server is started where the spec names none. report: called with an `Event` for
    what is worth telling, from any thread.

    A cell that is refused or fails is recorded with its reason and stops nothing else: see `SweepOutcome.failed`.
    Raises what `plan` raises, and ServiceError where Prefect, Dask or MLflow do not answer. What is finished is kept
    whatever happens.
    """
    tell = report or silent
    session = _session(spec, tell, Options(workers=workers))
    outcome = conduct(session, tell, in_process=in_process, retry_failed=retry_failed, track=track)
    failed = []
    for cell in session.plan.cells:
        if reason := session.frontier.view.trouble(cell):
            failed.append(FailedCell(cell.id, cell.name, "refused" if cell.refused else "failed", reason))
    return SweepOutcome(
        session.spec.name, not outcome.troubled, outcome.summary, outcome.report, outcome.remarks, tuple(failed),
        session.results.absolute(),
    )  # fmt: skip


def results(spec: SpecLike) -> pa.Table:
    """Return the scores of a sweep as its store holds them now: a row for each cell, split and task. Writes nothing.

    A refused cell is measured on nothing; it has one row, where split, side, category, task and score are null.

    spec: see `SpecLike`. `results(spec).to_pandas()` gives a data frame where pandas is installed. The columns:

        sweep      string        the sweep's name
        cell       string        id of the cell, the same when the spec is extended
        kind       string        base, expert, multitask or merge
        name       string        the cell's name in reports
        method     string        label of the method; '' for baselines
        values     string        its values as JSON; '{}' for baselines
        count      int64         how many experts are merged
        subset     int64         number of the draw of experts; −1 for baselines
        experts    list<string>  names of the experts
        status     string        of the cell: done, pending, failed or refused
        reason     string        why it failed or was refused; else ''
        chosen     bool          its values won on validation items, or there was nothing to choose
        split      string        test or validation
        side       string        held_in: experts were trained for the task; held_out: none was
        category   string        the category of the task in the spec
        task       string        the task
        score      double        mean over the items, or the perplexity …; null where it is not measured
        items      int64         how many items were scored; 0 where it is not measured
        model      string        key of the step that makes the model
        digest     string        SHA-256 of the model's weights; '' where it is not known

    Raises what `plan` raises, but for CapacityError.
    """
    session = _session(spec, silent)
    return score_table(session.plan, collect(session.frontier))


def _session(spec: SpecLike, report: Report, options: Options = Options()) -> Session:
    if isinstance(spec, Spec):
        return session_of(spec, report, options)
    if isinstance(spec, Mapping):
        return session_of(parse_spec(spec, "spec"), report, options)
    if isinstance(spec, str | os.PathLike):
        return open_session(Path(spec), report, options)
    raise SpecError(f"spec is a {type(spec).__name__}; give the path of a spec file, a mapping or a Spec")


def _described(session: Session, costs: Cost) -> SweepPlan:
    return SweepPlan(
        session.spec.name,
        tuple(_planned(session, cell) for cell in session.plan.cells),
        StepsToDo(costs.statistics, costs.merges, costs.evaluations),
        costs.bytes_read,
        costs.bytes_written,
        costs.disk,
        costs.peak_memory,
        costs.seconds,
        plan_text(session, costs, cells=False),
    )


def _planned(session: Session, cell: Cell) -> PlannedCell:
    frontier = session.frontier
    reason = frontier.view.trouble(cell)
    state: Literal["done", "to do", "refused", "failed"]
    if cell.refused:
        state = "refused"
    elif reason:
        state = "failed"
    else:
        state = "to do" if any(True for _ in frontier.choice.wanted(cell)) else "done"
    return PlannedCell(
        cell.id,
        cell.kind,
        cell.name,
        cell.method,
        dict(cell.values),
        cell.count,
        cell.subset,
        cell.experts,
        state,
        reason,
    )

"""The sweep as a Prefect flow: the rounds of mergecore.sweeps, each part of a round a task, the heavy work on Dask."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.client.schemas.objects import State
from prefect.exceptions import CancelledRun
from prefect.futures import PrefectFuture, wait
from prefect.states import Cancelled, Completed
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from flows.cancelling import cancelling
from flows.mlflow_view import projected
from flows.outcome import Ending, conclusion, ending
from flows.pages import listed, logged, report_page, run_name, slug
from flows.session.narrow import narrowed
from flows.session.reuse import OpenSession, open_session_at, reusable
from flows.session.session import Session, open_session, session_of
from flows.session.settings import Options
from mergecore.engine.executor import Executor, InProcess
from mergecore.errors import ServiceError
from mergecore.events import Event, Report
from mergecore.execution.place import Place, drop_models, snapshots_of
from mergecore.registry import METHODS
from mergecore.sweeps.complete import finished, settle
from mergecore.sweeps.remaining import Round, cells_so_far, summary
from tasks.cluster.executor import OnDask, Stopped, stoppable
from tasks.cluster.workers import cuda_devices, dask_client
from tasks.download import download
from tasks.evaluate import evaluate
from tasks.merge import merge
from tasks.register import register
from tasks.statistics import statistics
from tasks.task_vectors import task_vectors
from tasks.track import Projection
from tasks.track import track as show
from tasks.work import TaskInput, counted, reuse

MethodName = Annotated[str, Field(json_schema_extra={"enum": list(METHODS)})]
"""A list of these is a multi-select in Prefect's form; the names are the registry's, so a new method is there too."""

TASK_VECTOR = "task vector"
"""What profiles of task vectors are shown as: they are a task of their own on Prefect's page."""

RUNNER: Any = ThreadPoolTaskRunner(max_workers=4)


@flow(
    name="sweep",
    flow_run_name=run_name,
    description="Run, resume or extend a sweep: only what the store does not hold yet is done.",
    task_runner=RUNNER,
    persist_result=False,
)
def sweep(
    spec: str,
    methods: list[MethodName] = [],  # noqa: B006
    counts: list[Annotated[int, Field(ge=1)]] = [],  # noqa: B006
    workers: Annotated[int, Field(ge=1)] | None = None,
    retry_failed: bool = False,
    track: bool = True,
) -> State[Any]:
    """Run, resume or extend a sweep: only what the store does not hold yet is done.

    Prefect shows what follows beside the fields of its form.

    Args:
        spec: Path of the spec file, seen from the project's folder.
        methods: Do only these of the spec's methods now; none chosen: all.
        counts: Do only these of the spec's numbers of experts now; none chosen: all.
        workers: Worker processes; none chosen: as the spec says, else one a core.
        retry_failed: Try cells again that failed before.
        track: Show the sweep in MLflow.
    """
    path, options = Path(spec), Options(workers=workers)
    is_part = bool(methods or counts)
    if is_part:
        opened = OpenSession(_part(path, methods, counts, options), logged())
    else:
        opened = open_session_at(path) or OpenSession(open_session(path, options=options), logged())
    session = opened.session
    if retry_failed:
        session.store.forgive()
        session.frontier.refresh()
    stop = threading.Event()
    with cancelling(stop), _executor(session, is_part, stop) as executor:
        try:
            place = session.place(executor, stoppable(opened.report, stop))
            _rounds(session, place)
            # Opened after the work on a part of it, so that it sees what was done: the report, MLflow and the registry
            # are about the spec, not about what was chosen in the form.
            whole = open_session(path, options=options) if is_part else session
            if not is_part or not summary(whole.frontier)["pending"]:
                wait_all([register.submit(name=whole.spec.name, work=TaskInput(place, [whole.frontier]))])
                settle(whole.frontier)
        except Stopped as error:
            return Cancelled(message=str(error))
    return _concluded(session, whole, track)


def _part(path: Path, methods: list[str], counts: list[int], options: Options) -> Session:
    """Return the session of some methods and counts of a spec."""
    return session_of(narrowed(path, methods, counts), options=options, home=path.absolute().parent)


def _concluded(session: Session, whole: Session, track: bool) -> State[Any]:
    """Write the report of the whole spec, show it in MLflow and on the run's page; return the state the run ends in."""
    ended = ending(whole)
    if track:
        projection = Projection(lambda: projected(whole, ended.summaries))
        wait_all([show.submit(name=session.spec.name, projection=projection)])
        ended.pages, ended.remarks = projection.pages, projection.remarks
    outcome = conclusion(whole, ended, {}, reused=False)
    create_markdown_artifact(
        report_page(outcome, session.results / "figure.png", ended.pages),
        key=f"report-{slug(session.spec.name)}",
        description=f"Report of the sweep {session.spec.name}",
    )
    counts = summary(session.frontier)
    name = "With failures" if counts["failed"] or counts["refused"] else "Completed"
    state: State[Any] = Completed(name=name, message=outcome.summary, data=ended)
    return state


def run_session(path: Path, session: Session, report: Report, track: bool) -> Ending:
    """Run the flow on the spec at `path` with a session that is open already. Return how the sweep ended.

    The run can be started again from Prefect's pages with the same parameters. Raises ServiceError where someone
    cancels it there.
    """
    name = session.spec.name
    run = sweep.with_options(flow_run_name=name)
    try:
        with reusable(path, session, report):
            ended = run(spec=str(path), workers=session.settings.chosen_workers, track=track)
    except CancelledRun:
        raise ServiceError(
            f"the sweep '{name}' was cancelled in Prefect; what is finished is kept, run the same command again to go "
            "on"
        ) from None
    return cast(Ending, ended)


@contextmanager
def _executor(session: Session, is_part: bool, stop: threading.Event) -> Iterator[Executor]:
    """Yield what does the sweep's work: a Dask cluster, unless nothing is missing. Raises CapacityError."""
    if (not session.frontier.round()) if is_part else (finished(session.frontier) is not None):
        yield InProcess()
        return
    session.check_fit(session.cost())
    settings, folder = session.settings, session.store.root
    devices = cuda_devices() if settings.cluster.value == "gpu" else ()
    home = session.plan.code.folder
    with dask_client(folder, settings.scheduler, settings.workers.value, devices, home) as client:
        yield OnDask(client, folder, stop)


def _rounds(session: Session, place: Place) -> None:
    """Do rounds of work until nothing is missing; the parts of a round run side by side."""
    frontier, plan = session.frontier, session.plan
    names = ["base", *(member.name for member in plan.pool.members)]
    snapshots = zip(names, snapshots_of(plan.pool), strict=True)
    wait_all([download.submit(name=name, work=TaskInput(place, [snapshot])) for name, snapshot in snapshots])
    for kind, count in reused(session).items():
        if count:
            reuse.submit(counted(count, kind)).wait()
    progress: Any = create_progress_artifact(
        _share(cells_so_far(frontier)),
        key=f"progress-{slug(session.spec.name)}",
        description=f"Share of the cells of {session.spec.name} that are done",
    )
    place.report(cells_so_far(frontier))
    drop_models(place, frontier.droppable())
    while round := frontier.round():
        wait_all(submitted(place, round))
        drop_models(place, frontier.droppable())
        cells = cells_so_far(frontier)
        place.report(cells)
        update_progress_artifact(progress, _share(cells))


def submitted(place: Place, round: Round) -> list[PrefectFuture[Any]]:
    """Submit a round's parts as tasks."""
    vectors = [item for item in round.statistics if item.shown_as == TASK_VECTOR]
    others = [item for item in round.statistics if item.shown_as != TASK_VECTOR]
    futures: list[PrefectFuture[Any]] = []
    if vectors:
        futures.append(
            task_vectors.submit(name=f"of {counted(len(vectors), 'expert')}", work=TaskInput(place, vectors))
        )
    if others:
        name = f"{listed(plan.step.plugin for plan in others)} ({len(others)})"
        futures.append(statistics.submit(name=name, work=TaskInput(place, others)))
    if round.merges:
        kinds = listed(plan.step.plugin for plan in round.merges)
        name = f"{counted(len(round.merges), 'model')}: {kinds}"
        futures.append(merge.submit(name=name, work=TaskInput(place, round.merges)))
    if round.scorings:
        kinds = listed(scoring.cell.method or scoring.cell.kind for scoring in round.scorings)
        name = f"{counted(len(round.scorings), 'model')}: {kinds}"
        futures.append(evaluate.submit(name=name, work=TaskInput(place, round.scorings)))
    return futures


def wait_all(futures: list[PrefectFuture[Any]]) -> None:
    """Wait for all; the first that failed outright is raised after the others have ended."""
    wait(futures)
    for future in futures:
        if future.state.is_failed() or future.state.is_crashed():
            future.result()


def reused(session: Session) -> dict[str, int]:
    """Return how much the store has at the start: the name of a kind, in the singular → how many of it."""
    counts = {"task vector": 0, "statistic": 0, "merged model": 0, "score": 0}
    seen: set[str] = set()
    frontier = session.frontier
    for cell in session.plan.cells:
        for split in session.plan.splits:
            tasks = cell.tasks_on(split)
            counts["score"] += sum(frontier.view.done(session.plan.evaluation(cell, split, task)) for task in tasks)
        if cell.merge is None or cell.model.key in seen:
            continue
        seen.add(cell.model.key)
        counts["merged model"] += frontier.view.done(cell.model)
        for needed in cell.merge.needed:
            if needed.step.key not in seen:
                seen.add(needed.step.key)
                kind = needed.shown_as if needed.shown_as in counts else "statistic"
                counts[kind] += frontier.view.done(needed.step)
    return counts


def _share(cells: Event) -> float:
    """Return the share of the cells that need no more work, in percent."""
    return round(100.0 * cells.done / max(1, cells.total), 1)

"""The sweep as a Prefect flow: the rounds of mergecore.sweep, each part of a round a task, the heavy work on Dask."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.client.schemas.objects import State
from prefect.exceptions import CancelledRun
from prefect.futures import PrefectFuture, wait
from prefect.states import Cancelled, Completed
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from flows.cancelling import cancelling
from flows.mlflow_view import mlflow_uri, projected, stays
from flows.outcome import conclusion
from flows.pages import listed, logged, report_page, run_name, slug
from flows.session.limits import check_fit, cores, memory_budget
from flows.session.session import Session, open_session, session_of
from mergecore.engine.executor import Executor, InProcess
from mergecore.errors import ServiceError, SpecError, nearest
from mergecore.events import Report
from mergecore.execution.place import Place, drop_models, snapshots_of
from mergecore.registry import METHODS
from mergecore.spec.sweep import Spec, parse_spec
from mergecore.spec.yaml_files import read_yaml
from mergecore.statistics.profile import Profile
from mergecore.sweeps.complete import finished, settle
from mergecore.sweeps.cost import cost
from mergecore.sweeps.measured import collect
from mergecore.sweeps.remaining import Round, summary
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
from tasks.work import Work, counted, reuse

MethodName = Annotated[str, Field(json_schema_extra={"enum": list(METHODS)})]
"""A list of these is a multi-select in Prefect's form; the names are the registry's, so a new method is there too."""


class Handed:
    """An opened session, whether links to its MLflow pages will hold, and the pages the flow gives back.

    whole: the spec's path where the session is of a part of it only.
    """

    def __init__(self, session: Session, report: Report, lasts: bool, whole: Path | None = None) -> None:
        self.session, self.report, self.lasts, self.whole = session, report, lasts, whole
        self.pages: dict[str, str] = {}


_handed: dict[str, Handed] = {}
"""By what is given to the flow in place of a spec's path."""


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
        counts: Do only these of the spec's numbers of experts now; none given: all.
        workers: Worker processes; none given: as the spec says, else one a core.
        retry_failed: Try cells again that failed before.
        track: Show the sweep in MLflow.
    """
    handed = _handed.get(spec) or _opened(spec, methods, counts)
    session = handed.session
    if retry_failed:
        session.store.forgive()
        session.frontier.refresh()
    stop = threading.Event()
    with cancelling(stop), _executor(handed, workers, stop) as executor:
        try:
            place = session.place(executor, stoppable(handed.report, stop))
            _rounds(session, place)
            # Opened after the work on a part of it, so that it sees what was done: the report, MLflow and the registry
            # are about the spec, not about what was chosen in the form.
            whole = open_session(handed.whole) if handed.whole else session
            if whole is session or not summary(whole.frontier)["pending"]:
                wait_all([register.submit(name=whole.spec.name, work=Work(place, [whole.frontier]))])
                settle(whole.frontier)
        except Stopped as error:
            return Cancelled(message=str(error))
    found = collect(whole.frontier)
    outcome = conclusion(whole, found, {}, reused=False)
    if track:
        projection = Projection(lambda: projected(whole, found, mlflow_uri(whole)))
        wait_all([show.submit(name=session.spec.name, projection=projection)])
        handed.pages.update(projection.pages)
    create_markdown_artifact(
        report_page(outcome, session.results / "figure.png", handed.pages if handed.lasts else {}),
        key=f"report-{slug(session.spec.name)}",
        description=f"Report of the sweep {session.spec.name}",
    )
    counts_of_part = summary(session.frontier)
    ended = "With failures" if counts_of_part["failed"] or counts_of_part["refused"] else "Completed"
    state: State[Any] = Completed(name=ended, message=outcome.summary, data=outcome.text)
    return state


def _opened(path: str, methods: Sequence[str], counts: Sequence[int]) -> Handed:
    session = session_of(narrowed(path, methods, counts))
    return Handed(session, logged(), stays(session), Path(path) if methods or counts else None)


def narrowed(path: str, methods: Sequence[str], counts: Sequence[int]) -> Spec:
    """The spec of a file, limited to some of its methods and counts as the form asks. Raises SpecError."""
    held = read_yaml(Path(path))
    whole = parse_spec(held, Path(path).name)
    known = {str(entry.get("method")) for entry in whole.methods} | {"average"}
    for name in methods:
        if name not in known:
            raise SpecError(f"methods: {path} has no '{name}'; {nearest(name, known)}")
    for count in counts:
        if count not in whole.counts:
            raise SpecError(f"counts: {path} has no {count}; known: {', '.join(map(str, whole.counts))}")
    if methods:
        held["methods"] = [entry for entry in held["methods"] if entry.get("method") in methods]
    if counts:
        held["counts"] = list(counts)
        asked = [
            {**entry, "counts": [n for n in entry["counts"] if n in counts]} if "counts" in entry else entry
            for entry in held["methods"]
        ]
        held["methods"] = [entry for entry in asked if entry.get("counts", counts)]
    return parse_spec(held, Path(path).name)


@contextmanager
def _executor(handed: Handed, workers: int | None, stop: threading.Event) -> Iterator[Executor]:
    """Where the sweep's work is done: a Dask cluster, unless nothing is missing. Raises CapacityError."""
    session, chosen = handed.session, handed.session.spec.run
    if (not session.frontier.round()) if handed.whole else (finished(session.frontier) is not None):
        yield InProcess()
        return
    count = workers or chosen.workers or cores()
    check_fit(session.spec, session.store, cost(session.frontier, count, memory_budget(session.spec)))
    address = None if chosen.dask in ("local", "gpu") else chosen.dask
    devices = cuda_devices() if chosen.dask == "gpu" else None
    with dask_client(session.store.root, address, workers or chosen.workers, devices) as client:
        yield OnDask(client, session.store.root, stop)


def run_session(session: Session, report: Report, workers: int | None, track: bool, lasts: bool) -> dict[str, str]:
    """The flow for a session that is open already. Returns the addresses of the pages that show the sweep."""
    name = session.spec.name
    held = _handed[name] = Handed(session, report, lasts)
    try:
        run = sweep.with_options(flow_run_name=name)
        run(spec=name, workers=workers, track=track)
    except CancelledRun:
        raise ServiceError(
            f"the sweep '{name}' was cancelled in Prefect; what is finished is kept, run the same command again to go on"
        ) from None
    finally:
        del _handed[name]
    return {f"MLflow {page}": url for page, url in held.pages.items() if page in ("curves", "leaderboard")}


def _rounds(session: Session, place: Place) -> None:
    """Rounds of work until nothing is missing; the parts of a round run side by side."""
    frontier, plan = session.frontier, session.plan
    names = ["base", *(member.name for member in plan.pool.members)]
    snapshots = zip(names, snapshots_of(plan.pool), strict=True)
    wait_all([download.submit(name=name, work=Work(place, [snapshot])) for name, snapshot in snapshots])
    for kind, count in reused(session).items():
        if count:
            reuse.submit(counted(count, kind)).wait()
    progress: Any = create_progress_artifact(
        _share(session),
        key=f"progress-{slug(session.spec.name)}",
        description=f"Share of the cells of {session.spec.name} that are done",
    )
    drop_models(place, frontier.droppable())
    while round := frontier.round():
        wait_all(submitted(place, round))
        drop_models(place, frontier.droppable())
        update_progress_artifact(progress, _share(session))


def submitted(place: Place, round: Round) -> list[PrefectFuture[Any]]:
    """A round's parts as tasks."""
    vectors = [plan for plan in round.statistics if isinstance(plan.statistic, Profile)]
    others = [plan for plan in (*round.statistics, *round.data) if not isinstance(plan.statistic, Profile)]
    futures: list[PrefectFuture[Any]] = []
    if vectors:
        futures.append(task_vectors.submit(name=f"of {counted(len(vectors), 'expert')}", work=Work(place, vectors)))
    if others:
        name = f"{listed(plan.step.plugin for plan in others)} ({len(others)})"
        futures.append(statistics.submit(name=name, work=Work(place, others)))
    if round.merges:
        kinds = listed(plan.step.plugin for plan in round.merges)
        name = f"{counted(len(round.merges), 'model')}: {kinds}"
        futures.append(merge.submit(name=name, work=Work(place, round.merges)))
    if round.scorings:
        kinds = listed(scoring.cell.method or scoring.cell.kind for scoring in round.scorings)
        name = f"{counted(len(round.scorings), 'model')}: {kinds}"
        futures.append(evaluate.submit(name=name, work=Work(place, round.scorings)))
    return futures


def wait_all(futures: list[PrefectFuture[Any]]) -> None:
    """Wait for all; the first that failed outright is raised after the others have ended."""
    wait(futures)
    for future in futures:
        if future.state.is_failed() or future.state.is_crashed():
            future.result()


def reused(session: Session) -> dict[str, int]:
    """How much was found in the store at the start, by kind, each kind named as one of it."""
    counts = {"task vector": 0, "statistic": 0, "merged model": 0, "score": 0}
    seen: set[str] = set()
    frontier = session.frontier
    for cell in session.plan.cells:
        for split in session.plan.splits:
            tasks = cell.tasks_on(split)
            counts["score"] += sum(frontier.done(session.plan.evaluation(cell, split, task)) for task in tasks)
        if cell.merge is None or cell.model.key in seen:
            continue
        seen.add(cell.model.key)
        counts["merged model"] += frontier.done(cell.model)
        for one in cell.merge.needed:
            if one.step.key not in seen:
                seen.add(one.step.key)
                kind = "task vector" if isinstance(one.statistic, Profile) else "statistic"
                counts[kind] += frontier.done(one.step)
    return counts


def _share(session: Session) -> float:
    counts = summary(session.frontier)
    return round(100.0 * (1 - counts["pending"] / max(1, sum(counts.values()))), 1)

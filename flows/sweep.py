"""The sweep as a Prefect flow: the rounds of mergecore.sweep, each part of a round a task, the heavy work on Dask."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture, wait
from prefect.states import Cancelled
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from flows.cancelling import cancelling
from flows.cluster import dask_client, devices
from flows.conduct import conclusion, mlflow_uri, projected
from flows.session import Session, session_of
from mergecore.errors import SpecError, nearest
from mergecore.frontier import Round, summary
from mergecore.method import Event, Report
from mergecore.run import Place, drop_models, snapshots_of
from mergecore.spec import Spec, parse_spec, read_yaml
from mergecore.statistics.profile import Profile
from tasks.download import download
from tasks.evaluate import evaluate
from tasks.merge import merge
from tasks.projection import Projection
from tasks.projection import track as show
from tasks.register import register
from tasks.spread import OnDask, Stopped
from tasks.statistics import statistics
from tasks.task_vectors import task_vectors
from tasks.work import Work, reuse

MethodName = Literal["average", "task_arithmetic", "ties", "fisher"]


class Handed:
    """A session that the command line has opened already, and the pages the flow gives back."""

    def __init__(self, session: Session, report: Report) -> None:
        self.session, self.report = session, report
        self.pages: dict[str, str] = {}


_handed: dict[str, Handed] = {}
"""By what is given to the flow in place of a spec's path."""


RUNNER: Any = ThreadPoolTaskRunner(max_workers=4)


@flow(name="sweep", task_runner=RUNNER, persist_result=False)
def sweep(
    spec: Annotated[str, Field(description="path of the spec file, from the project's folder")],
    methods: Annotated[list[MethodName], Field(description="only these methods; none: all of the spec")] = [],  # noqa: B006
    counts: Annotated[list[int], Field(description="only these numbers of experts; none: all of the spec")] = [],  # noqa: B006
    workers: Annotated[int | None, Field(description="worker processes; none: one a core")] = None,
    retry_failed: Annotated[bool, Field(description="try failed cells again")] = False,
    track: Annotated[bool, Field(description="show the sweep in MLflow")] = True,
) -> State[Any] | str:
    """Run, resume or extend a sweep. Everything already in the store is reused."""
    handed = _handed.get(spec) or Handed(session_of(narrowed(spec, methods, counts)), _logged())
    session, report = handed.session, handed.report
    if retry_failed:
        session.store.forgive()
        session.frontier.refresh()
    stop = threading.Event()
    chosen = session.spec.run
    address = None if chosen.dask in ("local", "gpu") else chosen.dask
    devices = devices() if chosen.dask == "gpu" else None
    with (
        cancelling(stop),
        dask_client(session.store.root, address, workers or chosen.workers, devices) as client,
    ):
        place = session.place(OnDask(client, session.store.root / "passes", stop), report)
        try:
            _rounds(session, place)
        except Stopped as error:
            return Cancelled(message=str(error))
    outcome = conclusion(session, {}, reused=False)
    create_markdown_artifact(outcome.text, key=f"report-{_slug(session.spec.name)}", description="the sweep's report")
    if track:
        projection = Projection(lambda: projected(session, mlflow_uri(session), {}))
        wait_all([show.submit(name=session.spec.name, projection=projection)])
        handed.pages.update(projection.pages)
    return outcome.text


def narrowed(path: str, methods: Sequence[str], counts: Sequence[int]) -> Spec:
    """The spec of a file, limited to some methods and counts as the form asks."""
    held = read_yaml(Path(path))
    if methods:
        held["methods"] = [entry for entry in held.get("methods", []) if entry.get("method") in methods]
    if counts:
        held["counts"] = list(counts)
    return parse_spec(held, Path(path).name)


def run_session(session: Session, report: Report, workers: int | None, track: bool) -> dict[str, str]:
    """The flow for a session that is open already. Returns the addresses of the pages that show the sweep."""
    name = session.spec.name
    held = _handed[name] = Handed(session, report)
    try:
        run = sweep.with_options(flow_run_name=name)
        run(spec=name, workers=workers, track=track)
    finally:
        del _handed[name]
    return {f"MLflow {page}": url for page, url in held.pages.items() if page in ("curves", "leaderboard")}


def _rounds(session: Session, place: Place) -> None:
    """Rounds of work until nothing is missing; the parts of a round run side by side."""
    frontier, plan = session.frontier, session.plan
    _said(
        wait_all(
            [
                download.submit(name=name, work=Work(place, [snapshot]))
                for name, snapshot in zip(
                    ["base", *(m.name for m in plan.pool.members)], snapshots_of(plan.pool), strict=True
                )
            ]
        )
    )
    for kind, count in reused(session).items():
        if count:
            reuse.submit(kind, count).wait()
    progress: Any = create_progress_artifact(
        _share(session), key=f"progress-{_slug(session.spec.name)}", description="cells done"
    )
    drop_models(place, frontier.droppable())
    while round := frontier.round():
        _said(wait_all(submitted(place, round)))
        drop_models(place, frontier.droppable())
        update_progress_artifact(progress, _share(session))
    _said(wait_all([register.submit(name=session.spec.name, work=Work(place, [frontier]))]))


def submitted(place: Place, round: Round) -> list[PrefectFuture[Any]]:
    """A round's parts as tasks."""
    vectors = [plan for plan in round.statistics if isinstance(plan.statistic, Profile)]
    others = [plan for plan in (*round.statistics, *round.data) if not isinstance(plan.statistic, Profile)]
    futures: list[PrefectFuture[Any]] = []
    if vectors:
        futures.append(task_vectors.submit(name=f"of {len(vectors)} experts", work=Work(place, vectors)))
    if others:
        kinds = ", ".join(sorted({plan.step.plugin for plan in others}))
        futures.append(statistics.submit(name=f"{kinds} × {len(others)}", work=Work(place, others)))
    if round.merges:
        kinds = ", ".join(sorted({plan.step.plugin for plan in round.merges}))
        futures.append(merge.submit(name=f"{len(round.merges)} models: {kinds}", work=Work(place, round.merges)))
    if round.scorings:
        names = ", ".join(scoring.cell.name for scoring in round.scorings[:2])
        more = f" and {len(round.scorings) - 2} more" if len(round.scorings) > 2 else ""
        futures.append(evaluate.submit(name=names + more, work=Work(place, round.scorings)))
    return futures


def wait_all(futures: list[PrefectFuture[Any]]) -> list[State[Any]]:
    """Wait for all; the first that failed outright is raised after the others have ended."""
    wait(futures)
    states = [future.state for future in futures]
    for future in futures:
        if future.state.is_failed() or future.state.is_crashed():
            future.result()
    return states


def _said(states: list[State[Any]]) -> None:
    for state in states:
        if state.message:
            get_run_logger().info("%s: %s", state.name, state.message)


def reused(session: Session) -> dict[str, int]:
    """Steps found in the store at the start, by kind of task."""
    counts = {"task vectors": 0, "statistics": 0, "merge": 0, "evaluate": 0}
    seen: set[str] = set()
    frontier = session.frontier
    for cell in session.plan.cells:
        for split in session.plan.splits:
            counts["evaluate"] += sum(frontier.done(session.plan.evaluation(cell, split, task)) for task in cell.tasks)
        if cell.merge is None or cell.model.key in seen:
            continue
        seen.add(cell.model.key)
        counts["merge"] += frontier.done(cell.model)
        for plans in cell.merge.statistics.values():
            for one in (inner for group in plans for inner in group.with_inputs()):
                if one.step.key not in seen:
                    seen.add(one.step.key)
                    kind = "task vectors" if isinstance(one.statistic, Profile) else "statistics"
                    counts[kind] += frontier.done(one.step)
    return counts


def _share(session: Session) -> float:
    counts = summary(session.frontier)
    return round(100.0 * (1 - counts["pending"] / max(1, sum(counts.values()))), 1)


def _logged() -> Report:
    """Progress into the flow run's log."""
    logger = get_run_logger()

    def report(event: Event) -> None:
        if event.done >= event.total:
            logger.info("%s (%g %s)", event.what, event.total, event.unit) if event.total else logger.info(
                "%s", event.what
            )

    return report


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())

"""Carries a session through: in this process, or with Prefect, MLflow and Dask around the same steps; then the report."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flows.mlflow_view import mlflow_uri, projected, shown, stays
from flows.outcome import Outcome, conclusion, written_report
from flows.session.limits import check_fit, cores, memory_budget
from flows.session.session import Session
from mergecore.engine.executor import InProcess
from mergecore.errors import ServiceError
from mergecore.events import Event, Report
from mergecore.execution.outcome import Done
from mergecore.sweeps.complete import complete, finished, settle
from mergecore.sweeps.cost import cost
from mergecore.sweeps.measured import collect

if TYPE_CHECKING:
    pass


def conduct(
    session: Session, report: Report, *, in_process: bool, workers: int | None, retry_failed: bool, track: bool
) -> Outcome:
    """Do what is missing and say what came out. Where nothing is missing no server and no cluster is started."""
    if retry_failed and (count := session.store.forgive()):
        report(Event(f"{count} failed steps will be tried again"))
        session.frontier.refresh()
    urls: dict[str, str] = {}
    known = sweep = finished(session.frontier)
    if sweep is None:
        count = workers or session.spec.run.workers or cores()
        check_fit(session.spec, session.store, cost(session.frontier, count, memory_budget(session.spec)))
        if in_process:
            _alone(session, report, workers)
        else:
            urls = _with_services(session, report, workers, track)
        sweep = collect(session.frontier)
    else:
        settle(session.frontier)
    # Where it was found finished and yet is not shown, the run that did the work was killed before it came to that, or
    # MLflow was away. With services the flow has shown it.
    if track and (in_process or known is not None) and not shown(session, sweep):
        written_report(sweep, session.results)
        with _tolerated(report):
            urls = dict(projected(session, sweep, None).urls)
    return conclusion(session, sweep, urls, reused=known is not None)


def _alone(session: Session, report: Report, workers: int | None) -> None:
    place = session.place(InProcess(workers or cores()), report)

    def say(done: Done) -> None:
        for name, reason in done.failures.items():
            report(Event(f"failed: {name}: {reason}"))

    complete(place, session.frontier, say)


def _with_services(session: Session, report: Report, workers: int | None, track: bool) -> dict[str, str]:
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.services.servers import servers
    from flows.sweep import run_session

    report(Event("starting Prefect and MLflow"))
    given = session.spec.run.prefect or os.environ.get("PREFECT_API_URL")
    lasts = stays(session)
    with servers(session.store.root, prefect=given, mlflow=mlflow_uri(session)) as addresses:
        report(Event(f"to watch: {addresses.prefect_page} and {addresses.mlflow_page}"))
        # The setting is for this thread, the variable for those that Prefect and Dask start: without it they would
        # bring up a server of their own.
        with (
            temporary_settings({PREFECT_API_URL: addresses.prefect}),
            _variables(PREFECT_API_URL=addresses.prefect, MLFLOW_TRACKING_URI=addresses.mlflow),
            _quiet_console(),
        ):
            found = run_session(session, report, workers, track, lasts)
            APILogWorker.drain_all(timeout=5)  # while the server is still there
    return {"Prefect": addresses.prefect_page, **found} if lasts else {}


@contextlib.contextmanager
def _variables(**values: str) -> Iterator[None]:
    """Environment variables set for a while, and left as they were found."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _quiet_console() -> Iterator[None]:
    """Prefect's log lines go to its pages; on the terminal stands our own progress."""
    from prefect.logging.configuration import setup_logging

    setup_logging()
    loggers = [logging.getLogger(name) for name in ("", "prefect", "prefect.flow_runs", "prefect.task_runs")]
    held = [(logger, list(logger.handlers)) for logger in loggers]
    for logger in loggers:
        logger.handlers = [handler for handler in logger.handlers if "Console" not in type(handler).__name__]
    try:
        yield
    finally:
        for logger, handlers in held:
            logger.handlers = handlers


@contextlib.contextmanager
def _tolerated(report: Report) -> Iterator[None]:
    """MLflow is a view: without it the sweep stands, and can be projected later."""
    try:
        yield
    except ServiceError as error:
        report(Event(f"not shown in MLflow: {error} Run `mergeloom track` later."))

"""Carries a sweep through: in this process, or with Prefect, MLflow and Dask around the same steps."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from flows.mlflow_view import projected, shown
from flows.outcome import Ending, Outcome, conclusion, ending
from flows.session.session import Session
from mergecore.engine.executor import InProcess
from mergecore.errors import ServiceError, masked
from mergecore.events import Event, Report
from mergecore.execution.outcome import Done
from mergecore.sweeps.complete import complete, finished, settle
from mergecore.sweeps.measured import spec_text
from mergecore.sweeps.remaining import cells_so_far
from tasks.environment import environment

LINKED = ("curves", "leaderboard")
"""The pages in MLflow that are named on the terminal."""


def conduct(session: Session, report: Report, *, in_process: bool, retry_failed: bool, track: bool) -> Outcome:
    """Do what is missing and say how the sweep ended. Where nothing is missing no server and no cluster is started."""
    if retry_failed and (count := session.store.forgive()):
        report(Event(f"{count} failed steps will be tried again"))
        session.frontier.refresh()
    urls: dict[str, str] = {}
    known = finished(session.frontier)
    if known is None:
        session.check_fit(session.cost())
        if in_process:
            _alone(session, report)
            ended = ending(session)
        else:
            ended, urls = _with_services(session, report, track)
    else:
        settle(session.frontier)
        ended = ending(session, known)
    # A sweep that was finished before and yet is not shown: the run that did the work was killed before it came to
    # that, or MLflow was away. With services the flow has shown it.
    if track and (in_process or known is not None) and not shown(session, ended.sweep):
        _show(session, ended)
    urls |= {f"MLflow {page}": url for page, url in ended.pages.items() if page in LINKED}
    return conclusion(session, ended, urls, reused=known is not None)


def _show(session: Session, ended: Ending) -> None:
    """Show the sweep in MLflow. If that fails, the sweep is complete all the same, and can be shown later."""
    try:
        result = projected(session, ended.summaries)
    except ServiceError as error:
        ended.remarks.append(f"not shown in MLflow: {error}")
        return
    ended.pages.update(result.urls)
    ended.remarks.extend(result.remarks)


def _alone(session: Session, report: Report) -> None:
    def say(done: Done) -> None:
        for name, reason in done.failures.items():
            report(Event(f"failed: {name}: {reason}"))
        report(cells_so_far(session.frontier))

    report(cells_so_far(session.frontier))
    complete(session.place(InProcess(session.settings.workers.value), report), session.frontier, say)


def _with_services(session: Session, report: Report, track: bool) -> tuple[Ending, dict[str, str]]:
    """Run the flow. Returns how the sweep ended, and the address of its page in Prefect where that stays."""
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.services.servers import servers
    from flows.sweep import run_session

    report(Event("starting Prefect and MLflow"))
    known = session.settings
    with servers(session.store.root, prefect=known.prefect.value, mlflow=known.mlflow.value) as addresses:
        report(Event("to watch: " + " and ".join(addresses.pages)))
        # The setting is for this thread, the variable for those that Prefect and Dask start: without it they would
        # bring up a server of their own.
        with (
            temporary_settings({PREFECT_API_URL: addresses.prefect}),
            environment(PREFECT_API_URL=addresses.prefect, MLFLOW_TRACKING_URI=addresses.mlflow),
            _quiet_console(),
        ):
            try:
                ended = run_session(_spec_file(session), session.at(addresses), report, track)
            finally:
                APILogWorker.drain_all(timeout=5)  # while the server is still there, after Ctrl-C too
    return ended, {"Prefect": addresses.prefect_page} if known.prefect.value else {}


def _spec_file(session: Session) -> Path:
    """Return the path of the spec's file; a spec that came from no file is written beside the sweep's results."""
    if session.path is not None:
        return session.path
    path = (session.results / "spec.yaml").absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(masked(spec_text(session.plan)))
    return path


@contextlib.contextmanager
def _quiet_console() -> Iterator[None]:
    """Prefect's log lines go to its pages; on the terminal stands our own progress."""
    from prefect.logging.configuration import setup_logging

    setup_logging()
    loggers = [logging.getLogger(name) for name in ("", "prefect", "prefect.flow_runs", "prefect.task_runs")]
    handlers_before = [(logger, list(logger.handlers)) for logger in loggers]
    for logger in loggers:
        logger.handlers = [handler for handler in logger.handlers if "Console" not in type(handler).__name__]
    try:
        yield
    finally:
        for logger, handlers in handlers_before:
            logger.handlers = handlers

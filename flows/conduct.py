"""Carries a session through: in this process, or with Prefect, MLflow and Dask around the same steps; then the report."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.budget import check_fit, cores, cost
from flows.session import Session
from mergecore.collect import collect
from mergecore.errors import EvaluationError, ServiceError
from mergecore.events import Event, Report
from mergecore.identity import digest
from mergecore.merging import InProcess
from mergecore.report import markdown, summarise, write_tables
from mergecore.run import Done
from mergecore.scores import CellScores, Sweep
from mergecore.store import write_json
from mergecore.sweep import complete, settle, to_register
from mergecore.trajectories import draw_searches

if TYPE_CHECKING:
    from tasks.track import TrackResult


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended: its report in Markdown, remarks after it, one line on it, whether cells failed or were refused."""

    report: str
    remarks: tuple[str, ...]
    summary: str
    troubled: bool

    @property
    def text(self) -> str:
        """What to print."""
        return "\n".join([self.report, "", *self.remarks])


def conduct(
    session: Session, report: Report, *, in_process: bool, workers: int | None, retry_failed: bool, track: bool
) -> Outcome:
    """Do what is missing and say what came out. Where nothing is missing no server and no cluster is started."""
    if retry_failed and (count := session.store.forgive()):
        report(Event(f"{count} failed steps will be tried again"))
        session.frontier.refresh()
    urls: dict[str, str] = {}
    known = sweep = finished(session)
    if sweep is None:
        check_fit(session.spec, session.store, cost(session.frontier, workers or session.spec.run.workers or cores()))
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


def finished(session: Session) -> Sweep | None:
    """The sweep as the store holds it; None where anything is to be done."""
    if session.frontier.round():
        return None
    sweep = collect(session.frontier)
    return sweep if to_register(session.frontier, sweep) is None else None


def _alone(session: Session, report: Report, workers: int | None) -> None:
    place = session.place(InProcess(workers or cores()), report)

    def say(done: Done) -> None:
        for name, reason in done.failures.items():
            report(Event(f"failed: {name}: {reason}"))

    complete(place, session.frontier, say)


def _with_services(session: Session, report: Report, workers: int | None, track: bool) -> dict[str, str]:
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.services import servers
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


def stays(session: Session) -> bool:
    """Whether the MLflow that shows the sweep is there for longer than the sweep, so that links to its pages hold."""
    from flows.services import serving

    return mlflow_uri(session) is not None or serving(session.store.root) is not None


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


def mlflow_uri(session: Session) -> str | None:
    """The spec's tracking URI, else MLFLOW_TRACKING_URI; None: the store's own."""
    return session.spec.run.mlflow or os.environ.get("MLFLOW_TRACKING_URI")


def projected(session: Session, sweep: Sweep, uri: str | None, rebuild: bool = False) -> TrackResult:
    """The session's sweep shown in MLflow; a server over the store's own database is started for it where no URI is known."""
    from tasks import track

    paths = {path.name: path for path in session.results.glob("*") if path.suffix in (".png", ".md", ".parquet")}
    function = track.rebuild if rebuild else track.project
    known = uri or mlflow_uri(session)
    _shown_file(session).unlink(missing_ok=True)
    if known:
        result = function(sweep, known, paths, {}, session.store.root / "locks")
    else:
        from flows.services import mlflow_server

        with mlflow_server(session.store.root) as address:
            result = function(sweep, address, paths, {}, session.store.root / "locks")
    _shown_file(session).parent.mkdir(parents=True, exist_ok=True)
    write_json(_shown_file(session), {"sweep": _said(sweep)})
    return result


def shown(session: Session, sweep: Sweep) -> bool:
    """Whether the last projection into MLflow went through and the sweep was then what it is now."""
    try:
        held = json.loads(_shown_file(session).read_text())
    except (OSError, ValueError):
        return False
    return bool(held.get("sweep") == _said(sweep))


def _shown_file(session: Session) -> Path:
    return session.results / "shown.json"


def _said(sweep: Sweep) -> str:
    """Digest of what a projection says: spec, cells with their states and digests, scores, what is registered."""
    cells = [
        [cell.cell, cell.name, cell.status, cell.reason, cell.chosen, cell.digest, _means(cell)] for cell in sweep.cells
    ]
    ways = [[way.name, way.state, len(way.trials), way.result] for way in sweep.searches]
    return digest([sweep.spec, cells, dict(sweep.registered or {}), *([ways] if ways else [])])


def _means(cell: CellScores) -> dict[str, dict[str, str]]:
    return {split: {task: repr(found.mean()) for task, found in held.items()} for split, held in cell.items.items()}


def written_report(sweep: Sweep, folder: Path, split: str = "test") -> tuple[str, list[Path]]:
    """The report as text, and the files in `folder` that it was written to: tables, report.md and the figure."""
    found = summarise(sweep, split)
    paths = list(write_tables(found, folder))
    if found.curve.num_rows:
        from mergecore.figure import draw

        paths += list(draw(found, folder / "figure"))
    if found.searches and (drawn := draw_searches(found.searches, folder / "searches.png")):
        paths.append(drawn)
    return markdown(found), paths


def conclusion(session: Session, sweep: Sweep, urls: Mapping[str, str], reused: bool) -> Outcome:
    """What a sweep that went through tells: the table, where the files are, what failed, where it can be seen."""
    counts = dict.fromkeys(("done", "pending", "failed", "refused"), 0) | Counter(cell.status for cell in sweep.cells)
    try:
        text, paths = written_report(sweep, session.results)
    except EvaluationError as error:
        text, paths = f"no report: {error}", []
    lines: list[str] = []
    if reused:
        lines.append("everything was found in the store; nothing had to be done")
    lines += [f"written: {path}" for path in paths if path.suffix in (".png", ".md")]
    lines += [f"{name}: {url}" for name, url in urls.items()]
    lines.append(f"`mergeloom serve --store {session.spec.output.store}` shows the same in Prefect and MLflow")
    troubled = counts["failed"] + counts["refused"]
    if troubled:
        lines.append(f"{troubled} of {sum(counts.values())} cells failed or were refused (--retry-failed tries again):")
        lines += [f"  {cell.name}: {cell.reason}" for cell in sweep.cells if cell.reason][:20]
    return Outcome(text.strip(), tuple(lines), _in_numbers(counts), troubled > 0 or counts["pending"] > 0)


def _in_numbers(counts: Mapping[str, int]) -> str:
    """'22 of 24 cells done, 2 refused'."""
    rest = "".join(f", {counts[state]} {state}" for state in ("pending", "failed", "refused") if counts[state])
    return f"{counts['done']} of {sum(counts.values())} cells done{rest}"

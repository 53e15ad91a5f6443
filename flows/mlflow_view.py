"""A sweep shown in MLflow: at which address, and whether the last projection went through."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flows.session.session import Session
from flows.session.settings import CHOSEN, MLFLOW_OF_SPEC
from mergecore.identity.keys import digest
from mergecore.reporting.scores import CellScores, Sweep
from mergecore.reporting.summary import Summaries
from mergecore.store.store import write_json
from tasks.tracking.address import public

if TYPE_CHECKING:
    from tasks.tracking.project import TrackResult


def projected(session: Session, summaries: Summaries, rebuild: bool = False) -> TrackResult:
    """Show the session's sweep in MLflow; where no address is known, a server over the store is started for it.

    The result has no addresses of pages where that server is gone afterwards. What could not be registered is in its
    remarks. Raises ServiceError where MLflow does not answer.
    """
    from tasks.tracking.project import project

    files = {path.name: path for path in session.results.glob("*") if path.suffix in (".png", ".md", ".parquet")}
    store, uri = session.store.root, session.settings.mlflow.value
    _shown_file(session).unlink(missing_ok=True)
    if uri:
        result = project(summaries, uri, files, {}, store, session.settings.registry, rebuild)
    else:
        from flows.services.servers import mlflow_server

        with mlflow_server(store) as address:
            result = project(summaries, address, files, {}, store, rebuild=rebuild)
    if not result.unregistered:
        _shown_file(session).parent.mkdir(parents=True, exist_ok=True)
        write_json(_shown_file(session), {"sweep": _content_digest(summaries.sweep), "mlflow": _named(session)})
    return result if session.settings.pages_last else replace(result, urls={})


def shown(session: Session, sweep: Sweep) -> bool:
    """Return whether the last projection went through, into the MLflow named now, and the sweep was what it is now."""
    try:
        record = json.loads(_shown_file(session).read_text())
    except (OSError, ValueError):
        return False
    return bool(record.get("sweep") == _content_digest(sweep) and record.get("mlflow") == _named(session))


def _named(session: Session) -> str | None:
    """Return the address that the spec or the caller names, without passwords; None where neither does."""
    mlflow = session.settings.mlflow
    return public(mlflow.value, mlflow.value) if mlflow.value and mlflow.origin in (CHOSEN, MLFLOW_OF_SPEC) else None


def _shown_file(session: Session) -> Path:
    return session.results / "shown.json"


def _content_digest(sweep: Sweep) -> str:
    """Return the digest of what a projection shows: spec, cells with states and scores, searches, registration."""
    cells = [
        [cell.cell, cell.name, cell.status, cell.reason, cell.chosen, cell.digest, _means(cell)] for cell in sweep.cells
    ]
    searches = [[search.name, search.state, len(search.trials), search.result] for search in sweep.searches]
    return digest([sweep.spec, cells, dict(sweep.registered or {}), *([searches] if searches else [])])


def _means(cell: CellScores) -> dict[str, dict[str, str]]:
    return {split: {task: repr(scores.mean()) for task, scores in tasks.items()} for split, tasks in cell.items.items()}

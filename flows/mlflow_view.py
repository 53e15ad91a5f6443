"""A sweep shown in MLflow: to which address, and whether the last projection went through."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from flows.session.session import Session
from mergecore.identity.keys import digest
from mergecore.reporting.scores import CellScores, Sweep
from mergecore.store.store import write_json

if TYPE_CHECKING:
    from tasks.tracking.project import TrackResult


def stays(session: Session) -> bool:
    """Whether the MLflow that shows the sweep is there for longer than the sweep, so that links to its pages hold."""
    from flows.services.servers import serving

    return mlflow_uri(session) is not None or serving(session.store.root) is not None


def mlflow_uri(session: Session) -> str | None:
    """The spec's tracking URI, else MLFLOW_TRACKING_URI; None: the store's own."""
    return session.spec.run.mlflow or os.environ.get("MLFLOW_TRACKING_URI")


def projected(session: Session, sweep: Sweep, uri: str | None, rebuild: bool = False) -> TrackResult:
    """The session's sweep shown in MLflow; a server over the store's own database is started for it where no URI is known."""
    from tasks.tracking import project as track

    paths = {path.name: path for path in session.results.glob("*") if path.suffix in (".png", ".md", ".parquet")}
    function = track.rebuild if rebuild else track.project
    known = uri or mlflow_uri(session)
    _shown_file(session).unlink(missing_ok=True)
    if known:
        result = function(sweep, known, paths, {}, session.store.root / "locks")
    else:
        from flows.services.servers import mlflow_server

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

"""Projects what the store knows of a sweep into MLflow, as often as wanted, always the same.

    experiment mergeloom/<sweep name>
      ├── run of kind 'sweep'    note, cells table, spec, report, figures
      ├── runs of kind 'series'  one per curve; step = number of experts
      ├── runs of kind 'search'  one per search; step = models tried
      └── runs of kind 'cell'    one per cell, below the sweep's run; out of the spec: tagged retired

MLflow is a view: nothing is read back from it but what it already shows. All writing to MLflow is in this package.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Experiment, Run

from mergecore.checkpoints.sources.digests import file_sha256
from mergecore.reporting.scores import Sweep
from mergecore.reporting.summary import TEST, VALIDATION, Summaries
from tasks.tracking import board as runs
from tasks.tracking import records, versions, views
from tasks.tracking.address import artifact_folder, is_database, public
from tasks.tracking.connection import LATER, UNREACHABLE, connected, reason
from tasks.tracking.note import sweep_note
from tasks.tracking.records import RunRecord

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackResult:
    """Where a projection can be looked at, and what it had to do.

    urls: 'sweep', 'runs', 'leaderboard', 'curves', 'charts' and, where a model is registered, 'model'; empty where the
    tracking store has no pages (a database). uri: of the tracking store, without passwords. written, unchanged,
    retired: numbers of runs. model, version: what the sweep has registered, '' where there is nothing. unregistered:
    why MLflow's registry has not got it, '' where it has; the runs are shown nevertheless.
    """

    experiment_id: str
    parent_run_id: str
    uri: str
    urls: Mapping[str, str] = field(default_factory=dict)
    written: int = 0
    unchanged: int = 0
    retired: int = 0
    model: str = ""
    version: str = ""
    unregistered: str = ""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What to tell a person: how to look at a database, and what could not be registered."""
        remarks = []
        if is_database(self.uri):
            remarks.append(f"`mlflow server --backend-store-uri {self.uri}` shows it in MLflow")
        if self.unregistered:
            remarks.append(
                f"not registered in MLflow: model '{self.model}', at {self.uri}: {self.unregistered}. {LATER}"
            )
        return tuple(remarks)


def project(
    summaries: Summaries,
    tracking_uri: str,
    artifacts: Mapping[str, Path],
    links: Mapping[str, str],
    store: Path,
    registry_uri: str | None = None,
    rebuild: bool = False,
) -> TrackResult:
    """Make MLflow show exactly this sweep; a run that shows the same already is left alone.

    tracking_uri: of a server or a database. artifacts: name → file put on the sweep's run (report, figures). links:
    title → address, for the note. store: the sweep's folder, with a lock per sweep that keeps two projections apart.
    registry_uri: None for the registry of the same server or database. rebuild: first delete every run of the sweep,
    retired ones too (MLflow can restore them). Raises ServiceError, soon, where MLflow does not answer; the projection
    can be made at any later time.
    """
    name = summaries.sweep.name
    with _locked(store / "locks", name), connected(tracking_uri, registry_uri) as client:
        experiment = _experiment(client, name, store)
        if rebuild:
            for run in runs.existing(client, experiment.experiment_id, name):
                client.delete_run(run.info.run_id)
        return _project(client, experiment, summaries, artifacts, links)


@contextlib.contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"track-{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # goes with the process, however that ends
        yield


def _experiment(client: MlflowClient, sweep_name: str, store: Path) -> Experiment:
    """Return the experiment of a sweep, made or brought back from the bin when needed.

    One that exists keeps the folder of its files.
    """
    name = f"mergeloom/{sweep_name}"
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        folder = artifact_folder(client.tracking_uri, store)
        location = (folder.absolute() / sweep_name).as_uri() if folder else None
        return client.get_experiment(client.create_experiment(name, artifact_location=location))
    if experiment.lifecycle_stage != "active":
        client.restore_experiment(experiment.experiment_id)
    return experiment


def _project(
    client: MlflowClient,
    experiment: Experiment,
    summaries: Summaries,
    artifacts: Mapping[str, Path],
    links: Mapping[str, str],
) -> TrackResult:
    sweep = summaries.sweep
    measured = {split: any(cell.items.get(split) for cell in sweep.cells) for split in (TEST, VALIDATION)}
    summary = summaries.on(TEST if measured[TEST] or not measured[VALIDATION] else VALIDATION)
    validation = summaries.cells(VALIDATION) if measured[VALIDATION] and measured[TEST] else None
    cells = list(records.cell_records(sweep, summary.cells, validation))
    note = sweep_note(sweep, summary, experiment.experiment_id, links)
    parent = _parent_record(sweep, cells, note, artifacts)
    board = runs.Board(client, experiment.experiment_id, sweep.name)
    parent_run = board.show(parent, artifacts=artifacts)
    shown = {record.identity: board.show(record, parent=parent_run).info.run_id for record in cells}
    for record in records.series_records(sweep, summary):
        board.show(record)
    for record in records.search_records(sweep):
        board.show(record)
    board.close()
    _save_pages(client, experiment, sweep, cells, note)
    version, unregistered = None, ""
    if sweep.registered is not None:
        try:
            version = versions.register(client, sweep, shown[str(sweep.registered["cell"])])
        except UNREACHABLE as error:
            unregistered = reason(error, client.tracking_uri)
    model = str(sweep.registered["name"]) if sweep.registered is not None else ""
    return TrackResult(
        uri=public(client.tracking_uri, client.tracking_uri),
        experiment_id=experiment.experiment_id,
        parent_run_id=parent_run.info.run_id,
        urls=_urls(client, experiment.experiment_id, parent_run, model if version else None),
        written=board.written,
        unchanged=board.unchanged,
        retired=board.retired,
        model=model,
        version=str(version.version) if version else "",
        unregistered=unregistered,
    )


def _parent_record(sweep: Sweep, cells: Sequence[RunRecord], note: str, artifacts: Mapping[str, Path]) -> RunRecord:
    pending = any(cell.status == "pending" for cell in sweep.cells)
    return RunRecord(
        kind="sweep",
        identity=sweep.name,
        name=sweep.name,
        status="SCHEDULED" if pending else "FINISHED",
        tags={
            records.SWEEP: sweep.name,
            records.KIND: "sweep",
            records.identity_tag("sweep"): sweep.name,
            records.STATE: records.CURRENT,
            records.NOTE: note,
            "mlflow.loggedArtifacts": json.dumps([{"path": "cells.json", "type": "table"}]),
        },
        files={"spec.yaml": public(sweep.spec), "cells.json": records.cells_table(cells)},
        attached={name: file_sha256(path) for name, path in artifacts.items()},
        seconds=sum(record.seconds for record in cells),
    )


def _save_pages(
    client: MlflowClient, experiment: Experiment, sweep: Sweep, cells: Sequence[RunRecord], note: str
) -> None:
    """The note and the saved views of the experiment. Views are a convenience: without them the sweep is all there."""
    tags = {records.NOTE: note, "mlflow.experimentKind": "custom_model_development"}
    wanted = {name: text for name, text in tags.items() if experiment.tags.get(name) != text}
    params = list(dict.fromkeys(name for record in cells for name in record.params))
    try:
        for key, state in views.view_states(sweep.select_by, params).items():
            if not views.is_saved(experiment.tags.get(views.PREFIX + key), key, state):
                wanted[views.PREFIX + key] = views.packed(key, state)
        for name, text in wanted.items():
            client.set_experiment_tag(experiment.experiment_id, name, text)
    except Exception as error:
        LOGGER.warning("MLflow took no saved views of sweep %s: %s", sweep.name, error)


def _urls(client: MlflowClient, experiment_id: str, parent: Run, model: str | None) -> dict[str, str]:
    server = public(client.tracking_uri).rstrip("/")
    if not server.startswith(("http://", "https://")):
        return {}
    query = "?workflowType=machine_learning"
    urls = {
        "sweep": f"{server}/#/experiments/{experiment_id}/runs/{parent.info.run_id}{query}",
        "runs": f"{server}/{views.page(experiment_id)}",
        "leaderboard": f"{server}/{views.page(experiment_id, views.LEADERBOARD)}",
        "curves": f"{server}/{views.page(experiment_id, views.CURVES)}",
        "charts": f"{server}/{views.page(experiment_id, views.CHARTS)}",
    }
    return {**urls, "model": f"{server}/#/models/{model}{query}"} if model else urls

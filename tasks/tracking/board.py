"""Brings the runs of one MLflow experiment in line with records: creates, changes, leaves alone, tags as retired."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from tasks.tracking.records import CURRENT, DIGEST, KIND, RETIRED, STATE, SWEEP, RunRecord, identity_tag

PARENT = "mlflow.parentRunId"
OPEN = ("RUNNING", "SCHEDULED")


def existing(client: MlflowClient, experiment_id: str, sweep_name: str) -> list[Run]:
    """Return every run of the sweep that is not deleted, the newest first."""
    runs: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs([experiment_id], max_results=1000, page_token=token)
        runs += [run for run in page if run.data.tags.get(SWEEP) == sweep_name]
        token = page.token
        if not token:
            return runs


class Board:
    """The runs of one sweep. Call `show` for each record, then `close`."""

    def __init__(self, client: MlflowClient, experiment_id: str, sweep_name: str) -> None:
        self.client = client
        self.experiment_id = experiment_id
        self.written = self.unchanged = self.retired = 0
        self._by_key: dict[tuple[str, str], Run] = {}
        self._left: dict[str, Run] = {}
        for run in existing(client, experiment_id, sweep_name):
            self._left[run.info.run_id] = run
            key = _key(run)
            if key not in self._by_key or DIGEST in run.data.tags:  # of two, one that was finished
                self._by_key[key] = run

    def show(self, record: RunRecord, parent: Run | None = None, artifacts: Mapping[str, Path] | None = None) -> Run:
        """Return the run that shows the record. It is written only where it does not show the record yet."""
        wanted = {**record.tags, **({PARENT: parent.info.run_id} if parent else {})}
        run = self._by_key.get((record.kind, record.identity))
        if run is not None and _cannot_become(run, record):
            del self._by_key[record.kind, record.identity]  # so that `close` takes it for one that was replaced
            run = None
        if run is not None:
            self._left.pop(run.info.run_id)
            tags = run.data.tags
            same = tags.get(DIGEST) == record.digest and run.info.status == record.status
            if same and all(tags.get(name) == wanted[name] for name in (STATE, PARENT) if name in wanted):
                self.unchanged += 1
                return run
        else:
            started = int((time.time() - record.seconds) * 1000)
            run = self.client.create_run(self.experiment_id, started, tags=wanted, run_name=record.name)
        self._write(run, record, wanted, artifacts or {})
        self.written += 1
        return run

    def _write(self, run: Run, record: RunRecord, tags: Mapping[str, str], artifacts: Mapping[str, Path]) -> None:
        run_id, now = run.info.run_id, int(time.time() * 1000)
        for path, text in record.files.items():
            self.client.log_text(run_id, text, path)
        for name, source in artifacts.items():
            self._upload(run_id, name, source)
        for name in run.data.tags:
            if name.startswith("cell.") and name not in tags:
                self.client.delete_tag(run_id, name)  # the reason of a failure that is none any more
        # The digest comes with everything else in one request, after the files: a run without it is written again. Tags
        # that stand there already would cost as much as all the rest.
        changed = {
            name: text for name, text in {**tags, DIGEST: record.digest}.items() if run.data.tags.get(name) != text
        }
        self.client.log_batch(
            run_id,
            metrics=[Metric(name, value, now, step) for name, value, step in record.metrics],
            params=[Param(name, text) for name, text in record.params.items() if name not in run.data.params],
            tags=[RunTag(name, text) for name, text in changed.items()],
        )
        if run.info.run_name != record.name:
            self.client.update_run(run_id, name=record.name)
        self.client.set_terminated(run_id, record.status, end_time=run.info.start_time + int(record.seconds * 1000))

    def _upload(self, run_id: str, path: str, source: Path) -> None:
        folder, _, name = path.rpartition("/")
        with tempfile.TemporaryDirectory() as temporary:  # MLflow takes a file's own name, ours may differ
            copy = shutil.copyfile(source, Path(temporary) / name)
            self.client.log_artifact(run_id, str(copy), folder or None)

    def close(self) -> None:
        """Tag the runs of cells that no record claimed as retired. Delete duplicates and runs never finished."""
        for run in self._left.values():
            tags = run.data.tags
            replaced = DIGEST not in tags or self._by_key.get(_key(run)) is not run
            if replaced or tags.get(KIND) != "cell":
                self.client.delete_run(run.info.run_id)
            elif tags.get(STATE) == CURRENT or run.info.status in OPEN:
                self.client.set_tag(run.info.run_id, STATE, RETIRED)
                if run.info.status in OPEN:
                    self.client.set_terminated(run.info.run_id, status="KILLED")
                self.retired += 1


def _key(run: Run) -> tuple[str, str]:
    kind = run.data.tags.get(KIND, "")
    return kind, run.data.tags.get(identity_tag(kind), "")


def _cannot_become(run: Run, record: RunRecord) -> bool:
    """Whether the run has something that MLflow cannot take back: a parameter, a metric, a point of a curve."""
    params, metrics = run.data.params, {name for name, _, _ in record.metrics}
    if any(record.params.get(name) != text for name, text in params.items()):
        return True
    unchanged = run.data.tags.get(DIGEST) == record.digest
    return not unchanged and (record.kind in ("series", "search") or not metrics.issuperset(run.data.metrics))

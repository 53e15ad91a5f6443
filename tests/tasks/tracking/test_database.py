"""MLflow as a database that is written directly: everything is there and in the files beside it, nothing is elsewhere."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from mergecore.errors import ServiceError
from mergecore.reporting.summary import Summaries
from tasks.tracking import project as track
from tasks.tracking.address import artifact_folder, in_full, public
from tests import example_sweep
from tests.example_sweep import few


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, which is empty; the process is set to an MLflow that is away."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://127.0.0.1:9")
    yield folder


def registered(name: str = "demo-model") -> Summaries:
    cells = few()
    best = next(cell for cell in cells if cell.name == "ties-n4")
    return Summaries(example_sweep.sweep(cells, "database", {**example_sweep.registration(best), "name": name}))


def test_the_model_is_registered_in_the_database_given(tmp_path: Path, elsewhere: Path) -> None:
    uri = f"sqlite:///{tmp_path}/data/views.db"
    environment = dict(os.environ)
    result = track.project(registered(), uri, {}, {}, tmp_path / "store")
    assert (result.version, result.unregistered, result.urls) == ("1", "", {})
    assert result.remarks == (f"`mlflow server --backend-store-uri {uri}` shows it in MLflow",)
    client = MlflowClient(uri, uri)
    champion = client.get_model_version_by_alias("demo-model", "champion")
    assert client.get_run(champion.run_id).info.run_name == "ties-n4"
    model = client.get_logged_model(champion.source.removeprefix("models:/"))
    files = tmp_path / "data" / "views-artifacts" / "database"
    assert (files / champion.run_id / "artifacts" / "lineage.json").exists()
    assert list(files.glob("models/*/artifacts/MLmodel"))
    assert model.artifact_location.startswith(files.as_uri())
    assert not list(elsewhere.iterdir()), "nothing is left in the current folder"
    assert dict(os.environ) == environment
    assert mlflow.get_tracking_uri() == mlflow.get_registry_uri() == "http://127.0.0.1:9"

    again = track.project(registered(), uri, {}, {}, tmp_path / "store")
    assert (again.version, again.written) == ("1", 0)
    rebuilt = track.project(registered(), uri, {}, {}, tmp_path / "store", rebuild=True)
    assert (rebuilt.version, rebuilt.unchanged) == ("2", 0)
    assert not list(elsewhere.iterdir())


def test_a_process_that_is_set_to_another_mlflow_stays_so(tmp_path: Path, elsewhere: Path) -> None:
    other = f"sqlite:///{tmp_path}/other.db"
    mlflow.set_tracking_uri(other)
    try:
        uri = f"sqlite:///{tmp_path}/views.db"
        assert track.project(registered(), uri, {}, {}, tmp_path / "store").version == "1"
        assert mlflow.get_tracking_uri() == os.environ["MLFLOW_TRACKING_URI"] == other
        assert not (tmp_path / "other.db").exists() and not list(elsewhere.iterdir())
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]


def test_a_relative_file_is_seen_from_the_current_folder(tmp_path: Path, elsewhere: Path) -> None:
    assert track.project(registered(), "sqlite:///views.db", {}, {}, tmp_path / "store").version == "1"
    assert {path.name for path in elsewhere.iterdir()} == {"views.db", "views-artifacts"}
    assert MlflowClient(f"sqlite:///{elsewhere}/views.db").get_experiment_by_name("mergeloom/database")


def test_a_model_that_cannot_be_registered_is_told(tmp_path: Path, elsewhere: Path) -> None:
    uri = f"sqlite:///{tmp_path}/views.db"
    result = track.project(registered("a/b"), uri, {}, {}, tmp_path / "store")  # MLflow allows no slash
    assert result.version == "" and "a/b" in result.unregistered
    assert f"not registered in MLflow: model 'a/b', at {uri}: " in result.remarks[-1]
    runs = MlflowClient(uri).search_runs([result.experiment_id])
    assert {run.info.run_name for run in runs} >= {"ties-n4", "base"}, "the runs are shown nevertheless"


def test_passwords_are_not_told(tmp_path: Path, elsewhere: Path) -> None:
    with pytest.raises(ServiceError, match=r"MLflow at http://127\.0\.0\.1:9 does not answer") as caught:
        track.project(registered(), "http://anna:s3cret@127.0.0.1:9", {}, {}, tmp_path)
    assert "s3cret" not in str(caught.value) and "anna" not in str(caught.value)
    uri = f"sqlite:///{tmp_path}/views.db"
    sweep = dataclasses.replace(registered().sweep, spec="run:\n  mlflow: postgresql://anna:s3cret@host/db\n")
    result = track.project(Summaries(sweep), uri, {}, {}, tmp_path)
    spec = Path(MlflowClient(uri).download_artifacts(result.parent_run_id, "spec.yaml")).read_text()
    assert spec == "run:\n  mlflow: postgresql://host/db\n"


def test_what_addresses_become(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert in_full("sqlite:///a/b.db?timeout=5") == f"sqlite:///{tmp_path}/a/b.db?timeout=5"
    for uri in (f"sqlite:///{tmp_path}/b.db", "sqlite:///:memory:", "postgresql://h/db", "http://h:1", "databricks"):
        assert in_full(uri) == uri
    assert artifact_folder("sqlite+pysqlite:///b.db", tmp_path / "store") == tmp_path / "b-artifacts"
    assert artifact_folder("postgresql+psycopg2://u:p@h/db", tmp_path) == tmp_path / "mlflow" / "artifacts"
    assert artifact_folder("http://h:1", tmp_path) is artifact_folder("databricks", tmp_path) is None
    assert public("at http://u:p@ss@h:1/x and redis://t@h") == "at http://h:1/x and redis://h"
    secret = "postgresql://h/db?user=u&password=p"
    assert public(f"{secret} is away", secret) == "postgresql://h/db is away"
    assert public(json.dumps({"mail": "a@b"})) == '{"mail": "a@b"}'

"""A sweep shown in an MLflow database by the commands that people type, in an empty folder that stays empty."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mlflow
import pytest
import yaml
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM

from tests import tiny_sweep
from tests.deployed import REPOSITORY

pytestmark = pytest.mark.timeout(1500)


def mergeloom(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    environment = {**kept, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flows.cli.main", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def check_champion(uri: str, name: str = "tiny-model") -> None:
    """The champion of that database's registry, with its card in MLflow and its weights where it says."""
    client = MlflowClient(uri, uri)
    champion = client.get_model_version_by_alias(name, "champion")
    assert str(champion.version) == "1" and champion.tags["sweep"] == "tiny"
    mlflow.set_tracking_uri(uri)
    try:
        assert mlflow.models.get_model_info(f"models:/{name}@champion").run_id == champion.run_id
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    weights = unquote(urlsplit(champion.tags["weights.uri"]).path)
    assert AutoModelForCausalLM.from_pretrained(weights).config.model_type == "llama"


def test_a_sweep_is_registered_in_the_database_of_its_spec(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    uri, other = f"sqlite:///{tmp_path}/spec.db", f"sqlite:///{tmp_path}/option.db"
    path = tiny_sweep.write_spec(tmp_path, run={"workers": 1, "mlflow": uri})

    done = mergeloom(folder, "sweep", str(path), "--in-process")
    assert done.returncode == 0, done.stdout + done.stderr
    check_champion(uri)
    assert not list(folder.iterdir())
    assert f"`mlflow server --backend-store-uri {uri}` shows it in MLflow" in done.stdout

    done = mergeloom(folder, "track", str(path), "--uri", other)
    assert done.returncode == 0 and f"--backend-store-uri {other}`" in done.stdout, done.stdout + done.stderr
    check_champion(other)
    assert not list(folder.iterdir())

    # A name that MLflow's registry does not take, in a database that has shown nothing yet.
    spec = yaml.safe_load(path.read_text())
    spec["output"]["register"]["name"] = "tiny/model"
    spec["run"]["mlflow"] = f"sqlite:///{tmp_path}/another.db"
    path.write_text(yaml.safe_dump(spec))
    told = f"not registered in MLflow: model 'tiny/model', at sqlite:///{tmp_path}/another.db: "
    done = mergeloom(folder, "sweep", str(path), "--in-process")
    assert done.returncode == 0 and told in done.stdout, done.stdout + done.stderr
    assert not list((tmp_path / "store").rglob("shown.json")), "the next run tries again"
    done = mergeloom(folder, "track", str(path))
    assert done.returncode == 1 and told in done.stdout, done.stdout + done.stderr
    assert not list(folder.iterdir())

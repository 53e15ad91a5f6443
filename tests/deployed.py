"""A project as its users have it: servers up, `make deploy` done, `make worker` running, a sweep done in two runs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flows.services import supervise
from flows.services.servers import Addresses
from tests import tiny_sweep

REPOSITORY = Path(__file__).resolve().parents[1]
PATIENCE = 500.0  # seconds; a run imports torch, MLflow and Prefect before it does anything, on two busy cores


@dataclass(frozen=True)
class Project:
    """A deployed project.

    folder: its data. page: what a person opens for Prefect. mlflow: its tracking URI. part: the flow run that did a
    part of the spec. whole: the flow run after it that did the rest.
    """

    folder: Path
    page: str
    mlflow: str
    part: str
    whole: str

    @property
    def spec(self) -> Path:
        """The sweep's spec."""
        return self.folder / "tiny.yaml"

    def ask(self, path: str, **body: Any) -> Any:
        """Return the answer of Prefect's API: to a POST where there is a body, else to a GET."""
        return asked(f"{self.page}/api", path, body)

    def deployment(self, name: str) -> Any:
        """Return a deployment by its name, which is also the name of its flow."""
        return self.ask(f"/deployments/name/{name}/{name}")

    def start(self, name: str, **parameters: Any) -> str:
        """Start a run of a deployment. Return the run's id."""
        return started(f"{self.page}/api", name, parameters)

    def forget(self, run: str) -> None:
        """Delete a run, before a worker takes it."""
        answered("DELETE", f"{self.page}/api/flow_runs/{run}")

    def ended(self, run: str) -> Any:
        """Wait for a run to end and return it."""
        return waited(f"{self.page}/api", run)

    def tasks(self, run: str) -> dict[str, str]:
        """Return the name of each task of a run → the name of its state."""
        tasks = self.ask("/task_runs/filter", flow_runs={"id": {"any_": [run]}})
        return {task["name"]: task["state"]["name"] for task in tasks}

    def artifacts(self, run: str) -> dict[str, Any]:
        """Return key → artifact of a run."""
        artifacts = self.ask("/artifacts/filter", artifacts={"flow_run_id": {"any_": [run]}})
        return {artifact["key"]: artifact for artifact in artifacts}


def answered(method: str, url: str, body: Any = None) -> Any:
    """Return what Prefect answers. Its own client asks: a server that is busy says 503, and the client comes back."""
    from prefect.client.base import PrefectHttpxSyncClient

    with PrefectHttpxSyncClient(timeout=60) as client:
        answer = client.request(method, url, json=body)
        return answer.json() if answer.content else None


def asked(api: str, path: str, body: Mapping[str, Any]) -> Any:
    return answered("POST", api + path, body) if body else answered("GET", api + path)


def started(api: str, name: str, parameters: Mapping[str, Any]) -> str:
    deployment = asked(api, f"/deployments/name/{name}/{name}", {})
    run = asked(api, f"/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})
    return str(run["id"])


def waited(api: str, run: str) -> Any:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        flow_run = asked(api, f"/flow_runs/{run}", {})
        if flow_run["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            return flow_run
        time.sleep(0.5)
    raise AssertionError(f"the run has not ended: {flow_run['state']}")


def make(target: str, store: Path, api: str) -> list[str]:
    """A target of the Makefile as a command, without setting up the environment that runs this test."""
    binaries = Path(sys.executable).parent
    return ["make", "-o", "setup", target, f"BIN={binaries}", f"STORE={store}", f"SERVER={api}"]


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory, shared_servers: Addresses) -> Iterator[Project]:
    """The project, deployed, with a worker that runs; its sweep is done."""
    folder = tmp_path_factory.mktemp("project")
    spec = tiny_sweep.write_spec(folder)
    store = folder / "store"
    log = folder / "worker.log"
    addresses = shared_servers
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    environment = {**kept, "MLFLOW_TRACKING_URI": addresses.mlflow, "PREFECT_WORKER_QUERY_SECONDS": "3"}
    deployed = subprocess.run(
        make("deploy", store, addresses.prefect), cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    # Under the services' supervisor, so that the worker ends with this process however that ends.
    supervised = [sys.executable, "-I", "-S", supervise.__file__, str(os.getpid()), "5"]
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [*supervised, *make("worker", store, addresses.prefect)],
            cwd=REPOSITORY, env=environment, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        runs = []
        for chosen in ({"methods": ["average"], "counts": [2], "track": False}, {}):
            runs.append(started(addresses.prefect, "sweep", {"spec": str(spec), **chosen}))
            state = waited(addresses.prefect, runs[-1])["state"]
            assert state["name"] == "Completed", f"{state}\n{log.read_text()}"
        yield Project(folder, addresses.prefect_page, addresses.mlflow, *runs)
    finally:
        worker.terminate()
        worker.wait(30)

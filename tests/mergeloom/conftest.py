"""The installed wheel and its servers, once for all tests that need them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import yaml

from flows.services import servers as services
from flows.services import supervise
from tests import tiny_sweep
from tests.mergeloom.installed import Installed, installed

SCRIPT = """
import sys

import flows
import tasks

import mergeloom

assert flows.MINE and tasks.MINE
if __name__ == "__main__":
    outcome = mergeloom.sweep(sys.argv[1], workers=1)
    assert outcome.complete, outcome.report
    print(mergeloom.results(sys.argv[1]).num_rows, "rows;", mergeloom.plan(sys.argv[1]).steps.total, "steps left")
    print(mergeloom.__file__)
"""

DEPLOY = """
import sys

from prefect.deployments import run_deployment
from prefect.flows import EntrypointType

from mergeloom.flows.sweep import sweep

parameters = {"spec": sys.argv[1], "workers": 1, "track": False}
deployment = sweep.to_deployment("installed", parameters=parameters, entrypoint_type=EntrypointType.MODULE_PATH)
assert deployment.entrypoint == "mergeloom.flows.sweep.sweep", deployment.entrypoint
deployment.apply()
print(run_deployment("sweep/installed", timeout=0, as_subflow=False).id)
"""


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel, and in the user's folder a module `tasks`, a package `flows`, two specs and a recipe."""
    environment = installed(tmp_path_factory.mktemp("wheel"))
    tiny_sweep.write_spec(environment.project, experts=2, counts=[2], methods=[{"method": "average"}])
    spec = yaml.safe_load((environment.project / "tiny.yaml").read_text())
    spec["output"]["store"] = str(environment.project / "served")
    (environment.project / "served.yaml").write_text(yaml.safe_dump(spec))
    (environment.project / "tasks").rename(environment.project / "data")
    for name in ("tiny.yaml", "served.yaml"):
        path = environment.project / name
        path.write_text(path.read_text().replace(f"{environment.project}/tasks", f"{environment.project}/data"))
    (environment.project / "tasks.py").write_text("MINE = True\n")
    (environment.project / "flows").mkdir()
    (environment.project / "flows" / "__init__.py").write_text("MINE = True\n")
    (environment.project / "script.py").write_text(SCRIPT)
    (environment.project / "deploy.py").write_text(DEPLOY)
    return environment


@pytest.fixture(scope="session")
def served(environment: Installed) -> Iterator[services.Addresses]:
    """Prefect and MLflow over the store of served.yaml, held up by the installed command."""
    ports = [str(services.free_port()) for _ in range(2)]
    store = environment.project / "served"
    store.mkdir()
    words = environment.command(
        "mergeloom", "serve", "--store", store, "--prefect-port", ports[0], "--mlflow-port", ports[1]
    )
    # Under the services' supervisor, so that it ends with this process however that ends.
    supervised = [sys.executable, "-I", "-S", supervise.__file__, str(os.getpid()), "10"]
    with (environment.project / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [*supervised, *words], cwd=environment.project, env=environment.environment(), stdin=subprocess.DEVNULL,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        while (addresses := services.serving(store)) is None:
            assert process.poll() is None, (environment.project / "serve.log").read_text()
            time.sleep(0.5)
        yield addresses
    finally:
        process.terminate()
        process.wait(60)

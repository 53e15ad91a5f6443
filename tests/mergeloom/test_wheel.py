"""The installed wheel, beside packages of the user's that are called `tasks` and `flows`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from flows.services import servers as services
from flows.services import supervise
from tests import tiny_sweep
from tests.mergeloom.installed import Installed, installed

pytestmark = pytest.mark.timeout(900)

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


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
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


def test_the_wheel_has_no_package_with_an_everyday_name(environment: Installed) -> None:
    (wheel,) = (environment.folder.parent / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {
        "mergecore",
        "mergeloom",
        f"{wheel.stem.rsplit('-', 3)[0]}.dist-info",
    }
    assert {"mergeloom/py.typed", "mergecore/py.typed", "mergeloom/flows/sweep.py", "mergeloom/tasks/work.py"} <= set(
        names
    )
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_the_command_merges(environment: Installed) -> None:
    assert "mergeloom sweep SPEC" in environment.run("mergeloom", "--help")
    assert environment.run("mergeloom", "--version") == environment.run("python", "-m", "mergeloom", "--version")
    said = environment.run("mergeloom", "merge", "recipe.yaml", "merged")
    assert "digest" in said and (environment.project / "merged" / "model.safetensors").exists()


def test_a_sweep_from_a_script_beside_modules_of_the_same_names(environment: Installed) -> None:
    said = environment.run("python", "script.py", "tiny.yaml").splitlines()
    assert said[-2] == "7 rows; 0 steps left"
    assert Path(said[-1]).is_relative_to(environment.packages), "the installed package is used, not the checkout"


def test_a_sweep_with_prefect_mlflow_and_dask(environment: Installed, served: services.Addresses) -> None:
    said = environment.run("mergeloom", "sweep", "served.yaml", "--workers", "1")
    assert served.prefect_page in said
    assert "0 steps left" in environment.run("python", "script.py", "served.yaml")


def test_a_prefect_worker_imports_the_flow_by_its_module(environment: Installed, served: services.Addresses) -> None:
    """`prefect flow-run execute` is what a worker of a process pool starts for a run."""
    spec = yaml.safe_load((environment.project / "served.yaml").read_text())
    spec["methods"].append({"method": "slerp", "t": 0.5, "counts": [2]})
    (environment.project / "served.yaml").write_text(yaml.safe_dump(spec))
    address = {"PREFECT_API_URL": served.prefect}
    run = environment.run("python", "deploy.py", "served.yaml", more=address).split()[-1]
    environment.run("python", "-m", "prefect", "flow-run", "execute", run, more=address)
    state = json.loads(environment.run("python", "-c", ASK, f"{served.prefect}/flow_runs/{run}"))["state"]
    assert (state["type"], state["message"]) == ("COMPLETED", "5 of 5 cells done"), state


ASK = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1]).read().decode())"

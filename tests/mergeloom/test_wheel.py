"""The installed wheel, beside packages of the user's that are called `tasks` and `flows`."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import yaml

from flows.services.servers import Addresses
from tests.mergeloom.installed import Installed

pytestmark = pytest.mark.timeout(900)


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


def test_a_sweep_with_prefect_mlflow_and_dask(environment: Installed, served: Addresses) -> None:
    said = environment.run("mergeloom", "sweep", "served.yaml", "--workers", "1")
    assert served.prefect_page in said
    assert "0 steps left" in environment.run("python", "script.py", "served.yaml")


def test_a_prefect_worker_imports_the_flow_by_its_module(environment: Installed, served: Addresses) -> None:
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

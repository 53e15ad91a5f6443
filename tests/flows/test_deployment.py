"""Deployments: what `make deploy` registers, a worker runs, with the same results as the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.merge import merge
from flows.pages import listed, slug
from flows.session.narrow import narrowed
from flows.sweep import sweep
from mergecore.errors import SpecError
from mergecore.registry import METHODS
from mergecore.spec.yaml_files import as_yaml
from tests import tiny_sweep
from tests.deployed import REPOSITORY, Project

pytestmark = pytest.mark.timeout(1500)


COUNTED = """
import sys
from flows.cli.main import main
from flows.session import session

plans, make_plan = [], session.make_plan

def counted(*arguments):
    plans.append(1)
    return make_plan(*arguments)

session.make_plan = counted
try:
    main(["sweep", sys.argv[1]])
finally:
    print("plans made:", len(plans))
"""
"""The command `mergeloom sweep`, which says at the end how often it has planned."""


def fields(project: Project, name: str) -> dict[str, Any]:
    """The fields of a deployment's form."""
    return dict(project.deployment(name)["parameter_openapi_schema"]["properties"])


def test_the_settings_name_flows_that_exist() -> None:
    settings = yaml.safe_load((REPOSITORY / "deployments" / "prefect.yaml").read_text())
    entrypoints = {entry["name"]: entry["entrypoint"] for entry in settings["deployments"]}
    assert entrypoints == {"sweep": "flows/sweep.py:sweep", "merge": "flows/merge.py:merge"}
    assert (sweep.name, merge.name) == ("sweep", "merge")
    for entry in settings["deployments"]:
        assert all((REPOSITORY / path).exists() for path in (entry.get("parameters") or {}).values())


def test_settings_are_yaml_and_hold_no_secrets() -> None:
    for path in (REPOSITORY / "deployments").rglob("*.yaml"):
        assert list(yaml.safe_load_all(path.read_text())), path


def test_methods_and_counts_narrow_a_spec(tmp_path: Path) -> None:
    path = tiny_sweep.write_spec(tmp_path)
    assert {variant.method.name for variant in narrowed(path, ["ties"], []).variants} == {"average", "ties"}
    assert narrowed(path, [], [3]).counts == (3,)
    own = [{"method": "ties", "counts": [1, 2]}, {"method": "sce", "counts": [3]}, {"method": "karcher"}]
    path.write_text(as_yaml({**yaml.safe_load(path.read_text()), "methods": own}))
    counts = {variant.method.name: variant.counts for variant in narrowed(path, [], [2]).variants}
    assert counts == {"average": (2,), "ties": (2,), "karcher": (2,)}
    path = tiny_sweep.write_spec(tmp_path / "again")
    with pytest.raises(SpecError, match="did you mean 'ties'"):
        narrowed(path, ["tie"], [])
    with pytest.raises(SpecError, match="has no 'fisher'"):
        narrowed(path, ["fisher"], [])
    with pytest.raises(SpecError, match="has no 4; known: 2, 3"):
        narrowed(path, [], [4])


def test_names_that_pages_show() -> None:
    assert listed(["ties", "average", "ties"]) == "average, ties"
    assert listed(["e", "d", "c", "b", "a"]) == "a, b, c and 2 more"
    assert slug("Demo v1.2_x") == "demo-v1-2-x"


def test_every_field_of_the_forms_has_a_caption(project: Project) -> None:
    for name in ("sweep", "merge"):
        assert all(field.get("description") for field in fields(project, name).values()), name
    assert fields(project, "sweep")["methods"]["items"]["enum"] == list(METHODS)
    assert project.deployment("sweep")["parameters"] == {"spec": "examples/demo.yaml"}


def test_a_second_sweep_waits_and_the_schedule_is_off(project: Project) -> None:
    deployment = project.deployment("sweep")
    assert deployment["global_concurrency_limit"]["limit"] == 1
    assert deployment["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    (schedule,) = deployment["schedules"]
    assert not schedule["active"] and schedule["schedule"]["cron"] == "0 2 * * *"


def test_killed_runs_are_watched_for(project: Project) -> None:
    (automation,) = project.ask("/automations/filter", limit=10)
    assert automation["enabled"] and automation["actions"][0]["state"] == "CRASHED"
    assert project.deployment("sweep")["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"


def test_a_part_of_a_spec_is_done_without_the_rest(project: Project) -> None:
    state = project.ended(project.part)["state"]
    assert state["message"] == "5 of 8 cells done, 3 pending", "it says how far the spec is, not the part"
    tasks = project.tasks(project.part)
    assert set(tasks.values()) == {"Completed"}
    assert "merge 2 models: average" in tasks, "the average of two and the adapter in full"
    assert "register tiny" not in tasks, "a part does not say who is best"


def test_the_rest_of_a_spec_reuses_the_part(project: Project) -> None:
    run = project.ended(project.whole)
    assert run["state"]["message"] == "8 of 8 cells done"
    assert run["name"].startswith("tiny · ")
    tasks = project.tasks(project.whole)
    cached = {name for name, state in tasks.items() if state == "Cached"}
    assert {"download base", "download expert-0", "reuse 2 merged models"} < cached
    assert {"task vectors of 3 experts", "statistics threshold (3)", "register tiny", "track tiny"} < set(
        tasks
    ) - cached
    assert max(map(len, tasks)) < 60


def test_a_sweep_leaves_its_report(project: Project) -> None:
    artifacts = project.artifacts(project.whole)
    assert artifacts["progress-tiny"]["data"] == 100.0
    report = artifacts["report-tiny"]["data"]
    assert "](data:image/png;base64," in report and "viewStateShareKey" in report


def test_a_form_that_cannot_be_meant_is_refused(project: Project) -> None:
    with pytest.raises(Exception, match=r"409|422"):
        project.start("sweep", spec=str(project.spec), methods=["tie"])


def test_a_run_of_the_command_line_can_be_started_again_in_prefect(project: Project) -> None:
    """It has the path of its spec as a parameter, absolute, and yet plans once."""
    spec = {**yaml.safe_load(project.spec.read_text()), "name": "again"}  # it has everything but the registration
    path = project.folder / "again.yaml"
    path.write_text(as_yaml(spec))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    environment |= {"PREFECT_API_URL": f"{project.page}/api", "MLFLOW_TRACKING_URI": project.mlflow}
    environment |= {"PYTHONPATH": str(REPOSITORY), "PREFECT_HOME": str(project.folder / "prefect-home")}
    command = [sys.executable, "-c", COUNTED, path.name]
    ran = subprocess.run(command, cwd=project.folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "plans made: 1" in ran.stdout and "MLflow leaderboard: " in ran.stdout
    (run,) = project.ask("/flow_runs/filter", flow_runs={"name": {"any_": ["again"]}})
    assert run["parameters"]["spec"] == str(path)
    again = project.ended(project.start("sweep", **run["parameters"]))
    assert again["state"]["name"] == "Completed" and again["state"]["message"] == "8 of 8 cells done"
    assert project.tasks(again["id"])["register again"] == "Cached"


def test_a_merge_is_the_one_of_the_command_line(project: Project) -> None:
    ours, theirs = project.folder / "by-flow", project.folder / "by-command"
    run = project.start("merge", recipe=str(project.folder / "recipe.yaml"), out=str(ours), workers=1)
    command = [sys.executable, "-m", "flows.cli.main", "merge", str(project.folder / "recipe.yaml"), str(theirs)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    state = project.ended(run)["state"]
    assert state["name"] == "Completed" and str(ours) in state["message"], state
    weights = "model.safetensors"
    assert (ours / weights).read_bytes() == (theirs / weights).read_bytes()
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
    assert not list(project.folder.glob(".by-flow-*")), "nothing is left beside it"
    page = project.artifacts(run)["model-by-flow"]["data"]
    assert "Digest `" in page and "method: ties" in page

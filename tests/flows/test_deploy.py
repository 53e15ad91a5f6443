"""`make deploy` again and again: what people have changed in Prefect is as they left it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows import deploy
from flows.services.servers import servers
from mergecore.errors import SpecError
from tests.deployed import REPOSITORY, answered, make

pytestmark = pytest.mark.timeout(900)


class Prefect:
    """A Prefect server, asked as its pages ask it, and `make deploy` for it."""

    def __init__(self, api: str, store: Path) -> None:
        self.api, self.store = api, store

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        return answered(method, self.api + path, body)

    def deployment(self, name: str) -> Any:
        return self.ask("GET", f"/deployments/name/{name}/{name}")

    def schedules(self, name: str) -> dict[str, dict[str, Any]]:
        """Id → schedule. Two schedules of one id are the same: it was not deleted and made again."""
        return {schedule["id"]: schedule for schedule in self.deployment(name)["schedules"]}

    def automation(self) -> Any:
        (automation,) = self.ask("POST", "/automations/filter", {"limit": 10})
        return automation

    def deploy(self) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
        command = make("deploy", self.store, self.api)
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    store = tmp_path_factory.mktemp("store")
    with servers(store, mlflow="http://127.0.0.1:9") as addresses:
        yield Prefect(addresses.prefect, store)


def test_what_people_change_survives(prefect: Prefect) -> None:
    prefect.deploy()
    sweep, merge = prefect.deployment("sweep"), prefect.deployment("merge")
    (ours,) = sweep["schedules"]
    assert ours["slug"] == "nightly" and ours["schedule"]["cron"] == "0 2 * * *" and not ours["active"]
    assert ours["schedule"]["timezone"] == "Etc/UTC"
    assert sweep["parameters"] == {"spec": "examples/demo.yaml"} and not sweep["paused"]
    assert sweep["global_concurrency_limit"]["limit"] == 1
    assert merge["schedules"] == [] and merge["global_concurrency_limit"] is None
    steps = [{"prefect.deployments.steps.set_working_directory": {"directory": str(REPOSITORY)}}]
    assert sweep["pull_steps"] == merge["pull_steps"] == steps

    # Where every schedule has a slug, Prefect changes them one by one: another way to lose the switch.
    prefect.ask("PATCH", f"/deployments/{sweep['id']}/schedules/{ours['id']}", {"active": True})
    prefect.deploy()
    (on,) = prefect.deployment("sweep")["schedules"]
    assert on["active"] and on["id"] == ours["id"]

    people = {"schedule": {"cron": "30 5 * * 1", "timezone": "Europe/Berlin"}, "active": True}
    every = {"schedule": {"interval": 7200}, "active": False, "parameters": {"spec": "mine.yaml", "track": False}}
    prefect.ask("POST", f"/deployments/{sweep['id']}/schedules", [people, every])
    prefect.ask("POST", f"/deployments/{merge['id']}/schedules", [people])
    changed = {
        "active": True,
        "schedule": {"cron": "15 3 * * *", "timezone": "Asia/Tokyo"},
        "parameters": {"counts": [2]},
    }
    prefect.ask("PATCH", f"/deployments/{sweep['id']}/schedules/{ours['id']}", changed)
    own = {"concurrency_limit": 3, "concurrency_options": {"collision_strategy": "CANCEL_NEW"}}
    prefect.ask("PATCH", f"/deployments/{sweep['id']}", {"parameters": {"spec": "mine.yaml"}, "tags": ["mine"], **own})
    prefect.ask("PATCH", f"/deployments/{merge['id']}", {"paused": True, "description": "mine"})
    prefect.ask("PATCH", f"/automations/{prefect.automation()['id']}", {"enabled": False})
    before = {name: prefect.schedules(name) for name in ("sweep", "merge")}
    assert [len(schedules) for schedules in before.values()] == [3, 1]

    prefect.deploy()
    assert {name: prefect.schedules(name) for name in before} == before
    later, other = prefect.deployment("sweep"), prefect.deployment("merge")
    assert (later["id"], other["id"]) == (sweep["id"], merge["id"])
    assert later["parameters"] == {"spec": "mine.yaml"}
    assert later["global_concurrency_limit"]["limit"] == 3
    assert later["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
    assert other["paused"] and not later["paused"]
    assert not prefect.automation()["enabled"]
    # The rest is as the file says.
    assert later["tags"] == ["mergeloom"] and other["description"] == merge["description"]
    for name in (
        "entrypoint",
        "version",
        "pull_steps",
        "parameter_openapi_schema",
        "job_variables",
        "work_pool_name",
    ):
        assert later[name] == sweep[name], name

    prefect.ask("DELETE", f"/deployments/{sweep['id']}/schedules/{ours['id']}")
    prefect.ask("PATCH", f"/deployments/{merge['id']}", {"paused": False})
    prefect.ask("PATCH", f"/automations/{prefect.automation()['id']}", {"enabled": True})
    prefect.deploy()
    assert ours["id"] not in prefect.schedules("sweep"), "what people delete stays deleted"
    assert len(prefect.schedules("sweep")) == 2
    assert not prefect.deployment("merge")["paused"] and prefect.automation()["enabled"]


def test_a_key_that_nothing_follows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prefect.yaml"
    text = (REPOSITORY / "deployments" / "prefect.yaml").read_text()
    path.write_text(text)
    assert [entry.name for entry in deploy.read_entries(path)] == ["sweep", "merge"]
    path.write_text(text.replace("    concurrency_limit:\n      limit: 1", "    concurrency_limt:\n      limit: 1"))
    with pytest.raises(SpecError, match=r"deployments\.0\.concurrency_limt"):
        deploy.read_entries(path)


def test_no_server_is_said(tmp_path: Path) -> None:
    command = make("deploy", tmp_path, "http://user:secret@127.0.0.1:9/api")
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Prefect did not answer for the deployment sweep" in done.stderr and "Traceback" not in done.stderr, (
        done.stderr
    )

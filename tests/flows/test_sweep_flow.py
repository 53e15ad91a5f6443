"""A sweep with everything on (Prefect, MLflow, Dask): killed, robbed of a worker, cancelled, and started again."""

from __future__ import annotations

import glob
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]
import pytest
import yaml
from mlflow import MlflowClient

from flows.services.servers import Addresses
from mergecore.events import silent
from mergecore.store.store import Store
from tests.digits import DigitsTier
from tests.digits_sweep import EXPERTS, contents, digits_spec, leftovers, opened, stamps
from tests.processes import Started, kill_at, was_killed

REPOSITORY = Path(__file__).resolve().parents[2]
SPAN_SECONDS = 1.0
PATIENCE = 600.0
"""Seconds for what takes a few on a machine with nothing else to do."""


@pytest.fixture
def addresses(shared_servers: Addresses) -> Addresses:
    return shared_servers


def spec(tier: DigitsTier, store: Path, sweep_name: str) -> dict[str, Any]:
    names = EXPERTS[:3]
    return digits_spec(
        tier, store, name=sweep_name, counts=[3], evaluate__limit=30, evaluate__validation={"limit": 20},
        experts=[{"name": name, "source": str(tier.experts[name]), "tasks": [name]} for name in names],
        evaluate__held_in={name: [name] for name in names}, evaluate__recalibration_tasks=list(names),
        output__register={"name": sweep_name, "by": "held_in"}, run={"workers": 2},
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected(tier: DigitsTier, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the store holds after a run in one process that nobody disturbs."""
    swept = opened(spec(tier, tmp_path_factory.mktemp("undisturbed"), "flow"))
    assert not swept.run().failures
    return contents(swept.store)


class Sweeping:
    """A spec on disk and the processes that work on it."""

    def __init__(self, tier: DigitsTier, folder: Path, addresses: Addresses | None) -> None:
        self.store, self.path = Store(folder / "store"), folder / "flow.yaml"
        self.name = "flow"
        self.tier, self.addresses, self.folder = tier, addresses, folder
        self.path.write_text(yaml.safe_dump(spec(tier, self.store.root, self.name), sort_keys=False))
        self.log = folder / "log"

    def start(self, *command: str, alone: bool = False) -> subprocess.Popen[bytes]:
        """Start a command; `alone`: it brings up servers of its own."""
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))
        }
        environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1"}
        environment |= {"PREFECT_HOME": str(self.folder / "prefect-home"), "XDG_CACHE_HOME": str(self.folder / "cache")}
        if self.addresses is not None and not alone:
            environment |= {"PREFECT_API_URL": self.addresses.prefect, "MLFLOW_TRACKING_URI": self.addresses.mlflow}
        with self.log.open("ab") as output:
            return subprocess.Popen(command, stdout=output, stderr=output, cwd=self.folder, env=environment)

    def slow(self, alone: bool = False) -> subprocess.Popen[bytes]:
        """The sweep, slowed down."""
        return self.start(sys.executable, "-m", "tests.slow_sweep", str(self.path), str(SPAN_SECONDS), alone=alone)

    def finish(self) -> None:
        """Run the command that a person would type. Fails unless it ends well."""
        process = self.start(str(Path(sys.executable).parent / "mergeloom"), "sweep", str(self.path))
        assert process.wait(PATIENCE) == 0, self.said()

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def busy(self) -> list[int]:
        """Workers in the middle of a span, once at least one span of the merge is journalled."""
        # Not Path.glob, which fails where a draft is renamed while it looks.
        if not glob.glob(str(self.store.root / "drafts/*/journal-*/*.json")):  # noqa: PTH207
            return []
        return [int(path.name.partition("-")[2]) for path in self.store.root.glob("busy-*")]

    def wait_until_busy(self, process: subprocess.Popen[bytes]) -> list[int]:
        assert becomes(lambda: bool(self.busy()) or process.poll() is not None), self.said()
        assert process.poll() is None, self.said()
        return self.busy()

    def unmarked(self) -> None:
        for path in self.store.root.glob("busy-*"):
            path.unlink()


@pytest.fixture
def sweeping(tier: DigitsTier, tmp_path: Path, addresses: Addresses) -> Sweeping:
    return Sweeping(tier, tmp_path, addresses)


def becomes(condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that a process has brought up, directly or not."""
    return list(psutil.Process(process.pid).children(recursive=True))


def living(processes: list[psutil.Process]) -> list[str]:
    commands = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                commands.append(" ".join(process.cmdline()))
        except psutil.NoSuchProcess:
            continue
    return commands


def check_mlflow(address: str, name: str) -> None:
    """One run per cell, none of them open, and the registered version."""
    client = MlflowClient(address)
    experiment = client.get_experiment_by_name(f"mergeloom/{name}")
    assert experiment is not None
    runs = list(client.search_runs([experiment.experiment_id], max_results=1000))
    cells = [run.info.run_name for run in runs if run.data.tags.get("run.kind") == "cell"]
    assert len(cells) == len(set(cells)) == 8, cells  # base, three experts, average, two of task arithmetic, ties
    assert {run.info.status for run in runs} == {"FINISHED"}


def ask(address: str, path: str, **body: Any) -> Any:
    """A POST to Prefect's API."""
    request = urllib.request.Request(
        f"{address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as response:
        return json.loads(response.read())


@pytest.mark.timeout(1200)
def test_the_flow_killed_in_the_middle_of_a_merge_goes_on(
    sweeping: Sweeping, addresses: Addresses, expected: dict[str, str]
) -> None:
    process = sweeping.slow(alone=True)  # with servers of its own, which must end with it
    sweeping.wait_until_busy(process)
    others = family(process)
    assert len(others) >= 6, "two workers, two servers under their supervisors"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert becomes(lambda: not living(others), 30), living(others)
    sweeping.unmarked()
    finished = stamps(sweeping.store)
    assert finished and not any(name.startswith("registration/") for name in finished)

    sweeping.finish()
    assert contents(sweeping.store) == expected
    kept = stamps(sweeping.store)
    assert all(kept[name] == stamp for name, stamp in finished.items() if not name.startswith("merge/"))
    check_mlflow(addresses.mlflow, sweeping.name)
    assert not [name for name in leftovers(sweeping.store) if name.startswith(("drafts", "locks/pass"))]

    # Once more: everything is there, no server and no cluster is needed, so none is asked.
    before = contents(sweeping.store), stamps(sweeping.store)
    remarks = Started(conducted, sweeping.path, "http://127.0.0.1:9", 0, False).result(PATIENCE)
    assert (contents(sweeping.store), stamps(sweeping.store)) == before
    assert any("nothing had to be done" in remark for remark in remarks)


@pytest.mark.timeout(1200)
def test_a_worker_killed_in_the_middle_of_a_merge_is_replaced(
    sweeping: Sweeping, addresses: Addresses, expected: dict[str, str]
) -> None:
    process = sweeping.slow()
    victim = sweeping.wait_until_busy(process)[0]
    os.kill(victim, signal.SIGKILL)
    assert process.wait(PATIENCE) == 0, sweeping.said()
    assert (sweeping.store.root / f"busy-{victim}").exists(), "it did not get to the end of its span"
    sweeping.unmarked()
    assert contents(sweeping.store) == expected
    check_mlflow(addresses.mlflow, sweeping.name)
    assert not [name for name in leftovers(sweeping.store) if name.startswith(("drafts", "failures", "locks/pass"))]


@pytest.mark.timeout(1200)
def test_cancelling_in_prefect_stops_the_work(
    sweeping: Sweeping, addresses: Addresses, expected: dict[str, str]
) -> None:
    process = sweeping.slow()
    workers = sweeping.wait_until_busy(process)
    running = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}
    run = ask(addresses.prefect, "/flow_runs/filter", **running)[0]
    ask(addresses.prefect, f"/flow_runs/{run['id']}/set_state", state={"type": "CANCELLING"}, force=True)
    assert becomes(lambda: not any(psutil.pid_exists(worker) for worker in workers))
    assert process.wait(PATIENCE) == 1, sweeping.said()
    assert not any(name.startswith("registration/") for name in stamps(sweeping.store)), "it stopped before the end"
    assert "cancelled in Prefect" in sweeping.said() and "Traceback" not in sweeping.said(), sweeping.said()
    state = ask(addresses.prefect, "/flow_runs/filter", flow_runs={"id": {"any_": [run["id"]]}})[0]["state"]
    assert state["type"] == "CANCELLED"
    assert not list((sweeping.store.root / "failures").glob("*")), "nothing has failed"
    assert list((sweeping.store.root / "drafts").glob("*/journal-*/*.json")), "finished spans are kept"
    sweeping.unmarked()

    sweeping.finish()
    assert contents(sweeping.store) == expected
    check_mlflow(addresses.mlflow, sweeping.name)


def conducted(path: Path, mlflow: str, call: int, in_process: bool = True) -> tuple[str, ...]:
    """Run the sweep, killed at the n-th thing it writes to MLflow (0: never). Return what it says at the end."""
    from flows.conduct import conduct
    from flows.session.session import open_session
    from flows.session.settings import Options

    os.environ.update(MLFLOW_TRACKING_URI=mlflow, XDG_CACHE_HOME=str(path.parent / "cache"))
    os.environ["PREFECT_API_URL"] = "http://127.0.0.1:9/api"  # nobody is there
    if call:
        kill_at("mlflow:MlflowClient.log_batch", call)
    session = open_session(path, silent, Options(workers=1))
    outcome = conduct(session, silent, in_process=in_process, retry_failed=False, track=True)
    assert not outcome.troubled
    return outcome.remarks


@pytest.mark.timeout(1200)
def test_killed_while_mlflow_is_written_the_next_run_completes_it(sweeping: Sweeping, addresses: Addresses) -> None:
    sweeping.path.write_text(sweeping.path.read_text().replace("name: flow", "name: projected"))
    was_killed(conducted, sweeping.path, addresses.mlflow, 4, seconds=PATIENCE)
    client = MlflowClient(addresses.mlflow)
    experiment = client.get_experiment_by_name("mergeloom/projected")
    assert experiment is not None
    assert "RUNNING" in {run.info.status for run in client.search_runs([experiment.experiment_id])}
    before = stamps(sweeping.store)
    Started(conducted, sweeping.path, addresses.mlflow, 0).result(PATIENCE)  # nothing is missing but what MLflow shows
    assert stamps(sweeping.store) == before
    check_mlflow(addresses.mlflow, "projected")
    Started(conducted, sweeping.path, "http://127.0.0.1:9", 1).result(PATIENCE)  # and then MLflow is not asked again

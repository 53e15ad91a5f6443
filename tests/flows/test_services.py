"""Local services come up, say where they are, and are gone when the process that started them is: however it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped,unused-ignore]
import pytest

from flows.services import servers as services
from flows.services.servers import Addresses, Ports
from flows.session.settings import resolved
from mergecore.errors import ServiceError
from mergecore.spec.sweep import Run
from mergecore.store.store import Store

REPOSITORY = Path(__file__).resolve().parents[2]
SERVE = """
import sys
from pathlib import Path
from flows.services.servers import Ports, serve
serve(Path(sys.argv[1]), Ports(int(sys.argv[2]), int(sys.argv[3])), say=lambda line: print(line, flush=True))
"""
# Ignores SIGTERM and leaves a child that does so too, as servers with worker processes do when they are busy.
STUBBORN = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.fork()
while True:
    time.sleep(1)
"""
PARENT = """
import sys, time
from pathlib import Path
from flows.services import servers as services
services.GRACE_SECONDS = 0.5
folder = Path(sys.argv[1])
service = services.launch("Stubborn", folder, 1, "/", ["stubborn"], {"PYTHONPATH": str(folder)})
print(service.process.pid, flush=True)
time.sleep(600)
"""


def _python(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def _group(leader: int) -> list[psutil.Process]:
    """The living processes of a process group."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return members


def _becomes(condition: Callable[[], bool], seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Ports, subprocess.Popen[str], list[str]]]:
    """A `serve` in a process of its own: its folder, ports, process and what it printed."""
    folder = tmp_path_factory.mktemp("served")
    ports = Ports(services.free_port(), services.free_port())
    process = _python(SERVE, folder, ports.prefect, ports.mlflow)
    lines = [_line(process) for _ in range(3)]
    yield folder, ports, process, lines
    process.kill()
    process.wait()


def test_serve_says_where_to_look(served: tuple[Path, Ports, subprocess.Popen[str], list[str]]) -> None:
    folder, ports, _, lines = served
    assert f"http://127.0.0.1:{ports.prefect}" in lines[0]
    assert f"http://127.0.0.1:{ports.mlflow}/#/experiments?workflowType=machine_learning" in lines[1]
    addresses = Addresses(f"http://127.0.0.1:{ports.prefect}/api", f"http://127.0.0.1:{ports.mlflow}")
    assert services.serving(folder) == addresses
    assert services.answers(addresses.prefect_page)
    assert (folder / "prefect" / "prefect.db").exists() and (folder / "mlflow" / "mlflow.db").exists()


def test_sweeps_over_the_same_folder_join_a_running_serve(
    served: tuple[Path, Ports, subprocess.Popen[str], list[str]],
) -> None:
    folder, ports, _, _ = served
    settings = resolved(Run(), Store(folder))
    assert settings.prefect.value == f"http://127.0.0.1:{ports.prefect}/api" and settings.pages_last
    assert settings.mlflow.value == f"http://127.0.0.1:{ports.mlflow}" and "mergeloom serve" in settings.mlflow.origin
    with services.servers(folder, settings.prefect.value, settings.mlflow.value) as joined:
        assert joined == Addresses(settings.prefect.value, settings.mlflow.value)
    assert services.answers(joined.mlflow + "/health"), "leaving must not stop what we did not start"


def test_a_taken_port_names_the_option(served: tuple[Path, Ports, subprocess.Popen[str], list[str]]) -> None:
    folder, ports, _, _ = served
    with pytest.raises(ServiceError, match=rf"{ports.mlflow}.*--mlflow-port"):
        services.serve(folder, Ports(services.free_port(), ports.mlflow))


def test_nothing_is_left_when_serve_is_killed(served: tuple[Path, Ports, subprocess.Popen[str], list[str]]) -> None:
    folder, _, process, _ = served
    leaders = [child.pid for child in psutil.Process(process.pid).children()]
    assert len(leaders) == 2 and all(len(_group(leader)) >= 2 for leader in leaders)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert _becomes(lambda: not any(_group(leader) for leader in leaders))
    assert services.serving(folder) is None


def test_a_stubborn_service_and_its_fork_end_with_their_parent(tmp_path: Path) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    parent = _python(PARENT, tmp_path)
    leader = int(_line(parent))
    assert _becomes(lambda: len(_group(leader)) == 3)
    parent.kill()
    parent.wait()
    assert _becomes(lambda: not _group(leader))


def test_a_stubborn_service_is_stopped_with_its_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "GRACE_SECONDS", 0.5)
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    environment = {"PYTHONPATH": str(tmp_path)}
    service = services.launch("Stubborn", tmp_path, 1, "/", ["stubborn"], environment)
    assert _becomes(lambda: len(_group(service.process.pid)) == 3)
    service.stop()
    assert not _group(service.process.pid)
    service.stop()  # twice does no harm


def test_a_service_that_ends_at_once_shows_its_log(tmp_path: Path) -> None:
    service = services.launch("Absent", tmp_path, services.free_port(), "/", ["no_such_module"], {})
    with pytest.raises(
        ServiceError, match=r"(?s)ended while it was starting.*server.log.*No module named no_such_module"
    ):
        service.wait()


def test_a_service_dies_with_its_supervisor(tmp_path: Path) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN.replace("os.fork()", ""))
    service = services.launch("Stubborn", tmp_path, 1, "/", ["stubborn"], {"PYTHONPATH": str(tmp_path)})
    assert _becomes(lambda: len(_group(service.process.pid)) == 2)
    service.process.kill()
    service.process.wait()
    assert _becomes(lambda: not _group(service.process.pid))


def test_a_service_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "GRACE_SECONDS", 0.5)
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    service = services.launch(
        "Stubborn", tmp_path, services.free_port(), "/", ["stubborn"], {"PYTHONPATH": str(tmp_path)}
    )
    with pytest.raises(ServiceError, match="did not answer within 1 s"):
        service.wait(1)
    service.stop()

"""Local services: a Prefect and an MLflow server over one folder, started when needed, stopped when this process ends.

    folder/prefect/   PREFECT_HOME: prefect.db, server.log
    folder/mlflow/    mlflow.db, artifacts/, server.log
    folder/serving.json   the addresses of a running `serve`, for sweeps over the same folder

Each server runs under `supervise.py`, in a process group of its own that ends when this process ends, even by SIGKILL.
All listen on 127.0.0.1 only.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from flows.services import supervise
from mergecore.errors import ServiceError
from tasks.tracking.address import is_database, public

HOST = "127.0.0.1"
START_SECONDS = 120.0  # the first start after an installation compiles every module: 60 s on a loaded machine
GRACE_SECONDS = 4.0
SERVING = "serving.json"


@dataclass(frozen=True)
class Addresses:
    """Where the servers answer: Prefect's API (ends in /api) and MLflow's tracking URI."""

    prefect: str
    mlflow: str

    @property
    def prefect_page(self) -> str:
        """What a person opens for Prefect."""
        return public(self.prefect).removesuffix("/api")

    @property
    def mlflow_page(self) -> str:
        """What a person opens for MLflow: without the query its pages open on traces, not on runs."""
        return f"{public(self.mlflow)}/#/experiments?workflowType=machine_learning"

    @property
    def pages(self) -> list[str]:
        """Both, without MLflow's where it is a database."""
        return [self.prefect_page, *([] if is_database(self.mlflow) else [self.mlflow_page])]


@dataclass(frozen=True)
class Ports:
    """Fixed ports, for pages that people keep open."""

    prefect: int = 4200
    mlflow: int = 5000


@dataclass(frozen=True)
class Service:
    """A server that was started: its address without a path, the path that answers once it is ready, and its log."""

    name: str
    url: str
    health: str
    log: Path
    process: subprocess.Popen[bytes]

    def alive(self) -> bool:
        """Whether it runs (it may not answer yet)."""
        return self.process.poll() is None

    def wait(self, seconds: float = START_SECONDS) -> None:
        """Wait until it answers. Raises ServiceError with the end of its log when it ends or takes too long."""
        deadline = time.monotonic() + seconds
        while not answers(self.url + self.health):
            if not self.alive():
                raise ServiceError(f"{self.name} ended while it was starting.\n{last_lines(self.log)}")
            if time.monotonic() > deadline:
                raise ServiceError(f"{self.name} did not answer within {seconds:.0f} s.\n{last_lines(self.log)}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End it and everything it forked: SIGTERM, then SIGKILL after a grace of some seconds."""
        self.process.terminate()  # to the supervisor, which passes it on to the group
        try:
            self.process.wait(GRACE_SECONDS + 2)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(5)


def answers(url: str, seconds: float = 2.0) -> bool:
    """Whether a GET of `url` comes back with a success."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=seconds) as response:
            return bool(200 <= response.status < 300)
    except (urllib.error.URLError, OSError, ValueError):
        return False


def last_lines(log: Path, count: int = 15) -> str:
    """Return the last lines of a log and its path, for the end of an error message."""
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()][-count:]
    return "\n".join([f"The last lines of {log}:", *(f"    {line}" for line in lines)])


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of the local interface now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a closed connection is no owner
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """Return a port nobody listens on, below the range that systems give to outgoing connections.

    A server takes seconds to bind its port. A port from `bind(0)` would sometimes be taken by a connection meanwhile.
    Raises ServiceError where no port is free.
    """
    for _ in range(200):
        port = random.SystemRandom().randrange(20000, 32000)
        if is_free(port):
            return port
    raise ServiceError(f"No free port between 20000 and 32000 on {HOST}.")


def _environment(**ours: str) -> dict[str, str]:
    """Return the environment of a server, without the user's own settings for other servers."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    return {**kept, "PYTHONUNBUFFERED": "1", "DO_NOT_TRACK": "1", **ours}


def launch(
    name: str, folder: Path, port: int, health: str, module: Sequence[str], environment: dict[str, str]
) -> Service:
    """Start `python -m MODULE…` under the supervisor; does not wait."""
    log = folder / "server.log"
    supervisor = ["-I", "-S", str(Path(supervise.__file__).resolve()), str(os.getpid()), str(GRACE_SECONDS)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *supervisor, sys.executable, "-m", *module],
            cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    return Service(name, f"http://{HOST}:{port}", health, log, process)


def _home(folder: Path, name: str) -> Path:
    home = (folder / name).resolve()
    home.mkdir(parents=True, exist_ok=True)
    return home


def start_prefect(folder: Path, port: int | None = None) -> Service:
    """Start a Prefect server over `folder`/prefect without waiting for it; on a free port by default."""
    home, port = _home(folder, "prefect"), port or free_port()
    api = f"http://{HOST}:{port}/api"
    environment = _environment(
        PREFECT_HOME=str(home),
        PREFECT_API_URL=api,  # without this and the next, pages on another port than 4200 ask port 4200
        PREFECT_SERVER_UI_API_URL=api,
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
        PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT="false",
    )
    module = ["prefect", "server", "start", "--host", HOST, "--port", str(port)]
    return launch("The Prefect server", home, port, "/api/health", module, environment)


def start_mlflow(folder: Path, port: int | None = None) -> Service:
    """Start an MLflow server over `folder`/mlflow without waiting for it; on a free port by default."""
    home, port = _home(folder, "mlflow"), port or free_port()
    environment = _environment(
        MLFLOW_DISABLE_TELEMETRY="true",
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",  # with it: eight more processes, none of which we use
    )
    module = ["mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1", "--serve-artifacts"]
    module += ["--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}"]
    module += ["--artifacts-destination", str(home / "artifacts")]
    return launch("The MLflow server", home, port, "/health", module, environment)


STARTS: Mapping[str, Callable[[Path, int | None], Service]] = {"prefect": start_prefect, "mlflow": start_mlflow}


def serving(folder: Path) -> Addresses | None:
    """Return the addresses of a `serve` over the same folder where it answers, else None."""
    try:
        addresses = Addresses(**json.loads((folder / SERVING).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return addresses if answers(addresses.prefect + "/health") and answers(addresses.mlflow + "/health") else None


@contextlib.contextmanager
def _started(folder: Path, wanted: Mapping[str, int | None]) -> Iterator[dict[str, Service]]:
    """Yield the wanted servers (name → port, None for a free one). They start side by side and stop at the end."""
    services: dict[str, Service] = {}
    try:
        for name, port in wanted.items():
            services[name] = STARTS[name](folder, port)
        for service in services.values():
            service.wait()
        yield services
    finally:
        for service in services.values():
            service.process.terminate()  # all first, so that their grace runs at the same time
        for service in services.values():
            service.stop()


@contextlib.contextmanager
def servers(folder: Path, prefect: str | None = None, mlflow: str | None = None) -> Iterator[Addresses]:
    """Yield the addresses of Prefect and MLflow. One without an address is started over `folder` and stopped after.

    Raises ServiceError with the end of the log of a server that does not start.
    """
    missing = {name: None for name, address in (("prefect", prefect), ("mlflow", mlflow)) if not address}
    with _started(folder, missing) as started:
        yield Addresses(
            prefect=prefect or started["prefect"].url + "/api",
            mlflow=mlflow or started["mlflow"].url,
        )


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """Yield the tracking URI of an MLflow server over `folder`, started for the time of the block."""
    with _started(folder, {"mlflow": None}) as started:
        yield started["mlflow"].url


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Inside the block, treat SIGTERM (a container is stopped) as Ctrl-C."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def serve(folder: Path, ports: Ports = Ports(), say: Callable[[str], None] = print) -> None:
    """Run Prefect and MLflow over `folder` until Ctrl-C. Sweeps over the same folder use them.

    Raises ServiceError when a port is taken, and when a server ends by itself.
    """
    for name, port in asdict(ports).items():
        if not is_free(port):
            raise ServiceError(f"Port {port} on {HOST} is taken, so {name} cannot listen there: choose --{name}-port.")
    with _interrupted_by_sigterm(), contextlib.suppress(KeyboardInterrupt), _started(folder, asdict(ports)) as started:
        addresses = Addresses(started["prefect"].url + "/api", started["mlflow"].url)
        (folder / SERVING).write_text(json.dumps(asdict(addresses)))
        try:
            say(f"Prefect  {addresses.prefect_page}")
            say(f"MLflow   {addresses.mlflow_page}")
            say("Ctrl-C stops both.")
            while True:
                time.sleep(1)
                for service in started.values():
                    if not service.alive():
                        raise ServiceError(f"{service.name} has ended by itself.\n{last_lines(service.log)}")
        finally:
            (folder / SERVING).unlink(missing_ok=True)

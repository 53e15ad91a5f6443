"""A Dask cluster: worker processes on this machine, one per core or one per GPU, or a connection to one that runs."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import dask
from distributed import Client, Nanny, Scheduler, SpecCluster, Worker, WorkerPlugin
from distributed.utils import LoopRunner

from mergecore.errors import ServiceError
from mergecore.plugins.own_code import put_on_path
from tasks.reachable import unreachable

SLOT = "slot"
"""The resource every piece of work takes one of: a worker has one, so it does one thing at a time."""

START_SECONDS = 120.0
CONNECT_SECONDS = 10.0


class LogFile(WorkerPlugin):
    """Writes what a worker process logs into a file beside the other services' logs."""

    name = "mergeloom-log-file"

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def setup(self, worker: Worker) -> None:
        """Called in every worker process, those that replace a lost one included."""
        handler = logging.FileHandler(Path(self.folder) / f"worker-{worker.name}.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)
        distributed_logger = logging.getLogger("distributed")
        distributed_logger.addHandler(handler)  # it does not propagate to the root


class CodeFolder(WorkerPlugin):
    """Puts the folder of a spec on the path of a worker, before any work that needs a user's modules arrives."""

    name = "mergeloom-code-folder"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def setup(self, worker: Worker) -> None:
        """Called in every worker process, those that replace a lost one included."""
        put_on_path(self.folder)


def _worker(name: int, device: str | None) -> dict[str, Any]:
    """What one worker process is made of. `device`: a CUDA device it alone sees, or None for the CPU."""
    environment = {
        "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
        # The allocator keeps what a chunk frees: given back and faulted in again for every chunk, pages cost a fifth of
        # a merge's CPU time.
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_TOP_PAD_": str(64 << 20),
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    }  # fmt: skip
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    options = {
        "host": "127.0.0.1", "nthreads": 1, "name": name, "resources": {SLOT: 1}, "env": environment,
        "dashboard": False,
        # Memory is projected by the plan. Dask would count the pages of checkpoints mapped into memory as if they were
        # ours, and kill workers that do nothing but read.
        "memory_limit": 0, "silence_logs": logging.ERROR,
    }  # fmt: skip
    return {"cls": Nanny, "options": options}


@contextlib.contextmanager
def local_cluster(folder: Path, workers: int, devices: Sequence[str] = ()) -> Iterator[Client]:
    """A client of a cluster of processes on this machine, closed at the end.

    workers: how many processes. devices: CUDA devices by number; one process for each of them instead.
    Each has one thread and one slot. Logs go to `folder`/dask. Raises ServiceError when the workers do not come up.
    """
    logs = (folder / "dask").resolve()
    logs.mkdir(parents=True, exist_ok=True)
    chosen = list(devices) if devices else [None] * workers
    options = {"host": "127.0.0.1", "port": 0, "dashboard": True, "dashboard_address": "127.0.0.1:0"}
    settings = {
        # A worker that was killed takes longer than the default of 15 s to come back with torch imported; after that
        # time the cluster would close its nanny for good and go on with one worker less.
        "distributed.deploy.lost-worker-timeout": "180s",
        "distributed.worker.multiprocessing-method": "spawn",
        "distributed.comm.timeouts.connect": f"{START_SECONDS:.0f}s",
        "temporary-directory": str(logs),
    }
    with dask.config.set(settings), contextlib.ExitStack() as stack:
        specification = {number: _worker(number, device) for number, device in enumerate(chosen)}
        loop = stack.enter_context(_loop_deaf_to_interrupts())
        scheduler = {"cls": Scheduler, "options": options}
        try:
            cluster = stack.enter_context(SpecCluster(specification, scheduler, loop=loop, silence_logs=logging.ERROR))
            client = stack.enter_context(Client(cluster, set_as_default=False))
            client.wait_for_workers(len(chosen), timeout=START_SECONDS)
        except (OSError, TimeoutError, RuntimeError) as error:
            raise ServiceError(f"The local Dask cluster did not come up ({error}); its logs are in {logs}.") from error
        client.register_plugin(LogFile(str(logs)))
        yield client


@contextlib.contextmanager
def _loop_deaf_to_interrupts() -> Iterator[Any]:
    """An event loop in a thread of its own, in which SIGINT is blocked, as it is then in the workers that it starts.

    Ctrl-C in a terminal reaches every process there. We end the workers; they would each print a traceback first.
    """
    resource_tracker.ensure_running()  # whoever starts it first has SIGINT unblocked after
    runner = LoopRunner()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        runner.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield runner.loop
    finally:
        runner.stop()


@contextlib.contextmanager
def connected(address: str) -> Iterator[Client]:
    """A client of a cluster that runs elsewhere (`tcp://host:8786`); its workers must offer slots.

    Raises ServiceError when nobody answers within seconds, or no worker has a slot: Dask itself would wait for one
    without a word.
    """
    problem = _unreachable(address)
    if not problem:
        try:
            with _silent():
                client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        except Exception as error:  # another kind of server makes Dask fail in any way
            problem = f"{type(error).__name__}: {error}"
    if problem:
        raise ServiceError(
            f"No Dask scheduler answers at {address} ({problem.replace(_login(address), '')}); start one, or write "
            "run: {dask: local}"
        )
    with client:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        if not any(worker.get("resources", {}).get(SLOT) for worker in workers):
            raise ServiceError(
                f"None of the {len(workers)} Dask workers at {address} offers a slot: start them with "
                f'`dask worker {address} --nthreads 1 --resources "{SLOT}=1"`.'
            )
        yield client


def _unreachable(address: str) -> str:
    """Return why nothing can be reached at a scheduler's address; '' where something listens or Dask has to say."""
    scheme, _, rest = address.rpartition("://")
    host, _, port = rest.rpartition("@")[2].partition("/")[0].rpartition(":")
    if scheme not in ("", "tcp", "tls") or not host or not port.isdecimal():
        return ""
    return unreachable(host.strip("[]"), int(port))


def _login(address: str) -> str:
    """Return user and password that stand in an address, with the '@' after them; else a text that is nowhere."""
    login, at, _ = address.rpartition("://")[2].rpartition("@")
    return login + at or "\0"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Have Dask log nothing inside the block: what went wrong is said once, by us."""
    logger = logging.getLogger("distributed")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def dask_client(
    folder: Path, address: str | None, workers: int, devices: Sequence[str] = (), home: Path | None = None
) -> Iterator[Client]:
    """Yield a client of the cluster at `address`, or of a local one (see `local_cluster`) where there is no address.

    home: the folder from which a spec's own modules are imported.
    """
    with connected(address) if address else local_cluster(folder, workers, devices) as client:
        if home is not None:
            client.register_plugin(CodeFolder(home))
        yield client


def cuda_devices() -> list[str]:
    """The CUDA devices of this machine by number. Raises ServiceError where there is none."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise ServiceError(
            "run.dask is 'gpu', and torch sees no CUDA device here; say 'local', or install a CUDA build of torch"
        )
    return [str(number) for number in range(count)]

"""An executor that spreads spans and evaluations over the workers of a Dask cluster.

The object that all items share is pickled once into the store, which every worker sees. It lies in a draft that is
locked while it is needed. Results of more than a few hundred bytes come back through the same folder, so little goes
through the scheduler. When a worker dies its items are done again elsewhere; what was recorded is kept.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import shutil
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed import Client, wait
from distributed.scheduler import KilledWorker

from mergecore.errors import ServiceError
from mergecore.events import Event, Report
from mergecore.store.store import Store

PRIORITIES = {"run_span": 20, "run_on_model": 10}
"""Spans come before statistics on data, and these before evaluations."""
SLOT = {"slot": 1}
POLL_SECONDS = 1.0
FETCH_SECONDS = 30.0
SHARED = "shared"
THROUGH_SCHEDULER = 400
"""A result of at most so many bytes goes through the scheduler."""
MOST_SHARED = 4
"""A worker process keeps so many shared objects."""

STOPPED = "the flow was cancelled; run the same spec again to go on"

_shared: OrderedDict[str, Any] = OrderedDict()


class Stopped(Exception):
    """The flow was cancelled; what is finished is kept. It is no MergeloomError, since those are recorded as
    failures.
    """


def stoppable(report: Report, stop: threading.Event) -> Report:
    """Return a `report` that raises Stopped once `stop` is set, and so ends the download, hash or pass that reports."""

    def report_or_stop(event: Event) -> None:
        if stop.is_set():
            raise Stopped(STOPPED)
        report(event)

    return report_or_stop


class OnDask:
    """A `mergecore.engine.executor.Executor` over the workers of `client`.

    folder: the store's, or another that all workers see. stop: once set, all work ends.
    """

    def __init__(self, client: Client, folder: Path, stop: threading.Event | None = None) -> None:
        self.client, self.store, self.stop = client, Store(folder), stop or threading.Event()
        self.workers = max(1, len(client.scheduler_info(n_workers=-1)["workers"]))

    def each(
        self, function: Callable[[Any, Any], Any], shared: Any, items: Sequence[Any], at_once: int | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Yield (position, function(shared, item)) as they complete.

        at_once: how many items are submitted at a time; None: all. Raises the error of an item, ServiceError where
        workers die again and again, and Stopped where the flow was cancelled. The other items are then cancelled.
        """
        name = f"pass-{uuid.uuid4().hex}"
        priority = PRIORITIES.get(function.__name__, 0)
        with self._lent(name, shared) as path:

            def submitted(position: int) -> Any:
                key = f"{function.__name__}-{path.name.removeprefix('pass-')}-{position}"
                return self.client.submit(
                    call, str(path), function, items[position], key=key, resources=SLOT, priority=priority, pure=False
                )

            futures: dict[Any, int] = {}
            waiting = iter(range(len(items)))
            try:
                for position in itertools.islice(waiting, len(items) if at_once in (None, self.workers) else at_once):
                    futures[submitted(position)] = position
                for position, result in self._completed(futures):
                    if (following := next(waiting, None)) is not None:
                        futures[submitted(following)] = following
                    yield position, result
            finally:
                self.client.cancel(list(futures), force=True)

    @contextlib.contextmanager
    def _lent(self, name: str, shared: Any) -> Iterator[Path]:
        """Yield a folder with `shared` in it, removed at the end. It is locked: `Store.clean` removes unlocked ones."""
        path = self.store.root / "drafts" / name
        with self.store.lock(name):
            path.mkdir(parents=True, exist_ok=True)
            try:
                (path / SHARED).write_bytes(pickle.dumps(shared, protocol=pickle.HIGHEST_PROTOCOL))
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)
                (self.store.root / "locks" / name).unlink(missing_ok=True)

    def _completed(self, futures: dict[Any, int]) -> Iterator[tuple[int, Any]]:
        """Yield (position, result) as futures complete. They leave `futures`, which may grow meanwhile."""
        waiting = futures
        while waiting:
            if self.stop.is_set():
                raise Stopped(STOPPED)
            with contextlib.suppress(TimeoutError), self.client.as_current():
                wait(list(waiting), timeout=POLL_SECONDS, return_when="FIRST_COMPLETED")
            for future in [future for future in waiting if future.done()]:
                position = waiting.pop(future)
                try:
                    result = future.result(timeout=FETCH_SECONDS)
                except KilledWorker as error:
                    worker = error.last_worker.address if error.last_worker else "a worker"
                    raise ServiceError(
                        f"{worker} and others before it died at the same item of work, most likely out of memory; run "
                        "fewer workers (run.workers)"
                    ) from error
                except TimeoutError:
                    if future.status == "error":
                        raise
                    waiting[future] = position  # its worker died before it sent the result: it is done once more
                    continue
                yield position, result.taken() if isinstance(result, ResultFile) else result


@dataclass(frozen=True)
class ResultFile:
    """A result that a worker has left in a file."""

    path: str

    def taken(self) -> Any:
        """Return the result and remove its file."""
        path = Path(self.path)
        result = pickle.loads(path.read_bytes())
        path.unlink(missing_ok=True)
        return result


def call(path: str, function: Callable[[Any, Any], Any], item: Any) -> Any:
    """Return `function(shared, item)`, or a ResultFile where it is large. Runs in a worker.

    path: the folder of the shared object, which is read once per process.
    """
    if path not in _shared:
        _shared[path] = pickle.loads((Path(path) / SHARED).read_bytes())
        while len(_shared) > MOST_SHARED:
            _shared.popitem(last=False)
    result = function(_shared[path], item)
    data = pickle.dumps(result, protocol=pickle.HIGHEST_PROTOCOL)
    if len(data) <= THROUGH_SCHEDULER:
        return result
    file = Path(path) / uuid.uuid4().hex
    file.write_bytes(data)
    return ResultFile(str(file))

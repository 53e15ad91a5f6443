"""Spreads spans and evaluations over a Dask cluster: the engine's executor, by way of one shared client.

What all items share is pickled once into the store, which every worker sees, as a draft that is locked while it is
needed; results of more than a few hundred bytes come back by way of the same folder, so no more than that goes through
the scheduler for an item. A worker that dies loses nothing that was recorded: its
items are done again elsewhere.
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

PRIORITIES = {"run_span": 20, "find_on_data": 10}
"""Spans come before statistics on data, and these before evaluations."""
SLOT = {"slot": 1}
POLL_SECONDS = 1.0
FETCH_SECONDS = 30.0
SHARED = "shared"
THROUGH_SCHEDULER = 400
"""Bytes of a result that may go through the scheduler."""
KEPT = 4
"""How many shared objects a worker process keeps."""

STOPPED = "the flow was cancelled; run the same spec again to go on"

_shared: OrderedDict[str, Any] = OrderedDict()


class Stopped(Exception):
    """The flow was cancelled; what is finished is kept. No MergeloomError: those are recorded as a step's failure."""


def stoppable(report: Report, stop: threading.Event) -> Report:
    """The same `report`, which ends the work that reports (a download, a hash, a pass) once `stop` is set."""

    def heard(event: Event) -> None:
        if stop.is_set():
            raise Stopped(STOPPED)
        report(event)

    return heard


class OnDask:
    """An executor (mergecore.engine.pass_plan.Executor) over the workers of `client`. `stop`, once set, ends everything.

    folder: the store's, or another that all workers see.
    """

    def __init__(self, client: Client, folder: Path, stop: threading.Event | None = None) -> None:
        self.client, self.store, self.stop = client, Store(folder), stop or threading.Event()
        self.workers = max(1, len(client.scheduler_info(n_workers=-1)["workers"]))

    def each(
        self, function: Callable[[Any, Any], Any], shared: Any, items: Sequence[Any], at_once: int | None = None
    ) -> Iterator[tuple[int, Any]]:
        """(position, function(shared, item)) as they complete. Raises what an item raised, ServiceError where workers
        die again and again, Stopped where the flow was cancelled; the rest is called off then."""
        name = f"pass-{uuid.uuid4().hex}"
        priority = PRIORITIES.get(function.__name__, 0)
        with self._lent(name, shared) as path:

            def begun(position: int) -> Any:
                key = f"{function.__name__}-{path.name.removeprefix('pass-')}-{position}"
                return self.client.submit(
                    call, str(path), function, items[position], key=key, resources=SLOT, priority=priority, pure=False
                )

            futures: dict[Any, int] = {}
            left = iter(range(len(items)))
            try:
                for position in itertools.islice(left, len(items) if at_once in (None, self.workers) else at_once):
                    futures[begun(position)] = position
                for position, found in self._completed(futures):
                    if (following := next(left, None)) is not None:
                        futures[begun(following)] = following
                    yield position, found
            finally:
                self.client.cancel(list(futures), force=True)

    @contextlib.contextmanager
    def _lent(self, name: str, shared: Any) -> Iterator[Path]:
        """A folder that holds `shared`, gone at the end; locked, so that `Store.clean` removes those of killed processes."""
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
        """`futures` may grow meanwhile; those that are done leave it."""
        waiting = futures
        while waiting:
            if self.stop.is_set():
                raise Stopped(STOPPED)
            with contextlib.suppress(TimeoutError), self.client.as_current():
                wait(list(waiting), timeout=POLL_SECONDS, return_when="FIRST_COMPLETED")
            for future in [future for future in waiting if future.done()]:
                position = waiting.pop(future)
                try:
                    found = future.result(timeout=FETCH_SECONDS)
                except KilledWorker as error:
                    raise ServiceError(
                        f"{error.last_worker.address if error.last_worker else 'a worker'} and others before it died at "
                        "the same piece of work, most likely out of memory; run fewer workers (run.workers)"
                    ) from error
                except TimeoutError:
                    if future.status == "error":
                        raise
                    waiting[future] = position  # its worker died with the result in hand: it is done once more
                    continue
                yield position, found.taken() if isinstance(found, Left) else found


@dataclass(frozen=True)
class Left:
    """A result that lies in a file."""

    path: str

    def taken(self) -> Any:
        """The result; its file is gone then."""
        path = Path(self.path)
        found = pickle.loads(path.read_bytes())
        path.unlink(missing_ok=True)
        return found


def call(path: str, function: Callable[[Any, Any], Any], item: Any) -> Any:
    """Runs in a worker: `function(shared, item)`, the shared object read once per process."""
    if path not in _shared:
        _shared[path] = pickle.loads((Path(path) / SHARED).read_bytes())
        while len(_shared) > KEPT:
            _shared.popitem(last=False)
    found = function(_shared[path], item)
    data = pickle.dumps(found, protocol=pickle.HIGHEST_PROTOCOL)
    if len(data) <= THROUGH_SCHEDULER:
        return found
    left = Path(path) / uuid.uuid4().hex
    left.write_bytes(data)
    return Left(str(left))

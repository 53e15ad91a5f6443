"""Spreads spans and evaluations over a Dask cluster: the engine's executor, by way of one shared client.

What all items share is pickled once into the store's folder, which every worker sees; a few hundred bytes an item go
through the scheduler. A worker that dies loses nothing that was recorded: its items are done again elsewhere.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from distributed import Client, wait
from distributed.scheduler import KilledWorker

from mergecore.errors import MergeloomError, ServiceError

PRIORITIES = {"run_span": 20, "find_on_data": 10}
"""Spans come before statistics on data, and these before evaluations."""
SLOT = {"slot": 1}
POLL_SECONDS = 1.0
KEPT = 4
"""How many shared objects a worker process keeps."""

_shared: OrderedDict[str, Any] = OrderedDict()


class Stopped(MergeloomError):
    """The flow was cancelled; what is finished is kept."""


class OnDask:
    """An executor (mergecore.engine.Executor) over the workers of `client`. `stop`, once set, ends everything."""

    def __init__(self, client: Client, folder: Path, stop: threading.Event | None = None) -> None:
        self.client, self.folder, self.stop = client, folder, stop or threading.Event()
        self.workers = max(1, len(client.scheduler_info(n_workers=-1)["workers"]))

    def each(self, function: Callable[[Any, Any], Any], shared: Any, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """(position, function(shared, item)) as they complete. Raises what an item raised, ServiceError where workers
        die again and again, Stopped where the flow was cancelled; the rest is called off then."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{uuid.uuid4().hex}.pickle"
        path.write_bytes(pickle.dumps(shared, protocol=pickle.HIGHEST_PROTOCOL))
        priority = PRIORITIES.get(function.__name__, 0)
        futures = {
            self.client.submit(
                call, str(path), function, item, key=f"{function.__name__}-{path.stem}-{position}",
                resources=SLOT, priority=priority, pure=False,
            ): position
            for position, item in enumerate(items)
        }  # fmt: skip
        try:
            yield from self._completed(futures)
        finally:
            self.client.cancel(list(futures), force=True)
            path.unlink(missing_ok=True)

    def _completed(self, futures: dict[Any, int]) -> Iterator[tuple[int, Any]]:
        waiting = dict(futures)
        while waiting:
            if self.stop.is_set():
                raise Stopped("the flow was cancelled; run the same spec again to go on")
            with contextlib.suppress(TimeoutError), self.client.as_current():
                wait(list(waiting), timeout=POLL_SECONDS, return_when="FIRST_COMPLETED")
            for future in [future for future in waiting if future.done()]:
                position = waiting.pop(future)
                try:
                    yield position, future.result(timeout=30)
                except KilledWorker as error:
                    raise ServiceError(
                        f"{error.last_worker.address if error.last_worker else 'a worker'} and others before it died at "
                        "the same piece of work, most likely out of memory; run fewer workers (run.workers)"
                    ) from error


def call(path: str, function: Callable[[Any, Any], Any], item: Any) -> Any:
    """Runs in a worker: `function(shared, item)`, the shared object read once per process."""
    if path not in _shared:
        _shared[path] = pickle.loads(Path(path).read_bytes())
        while len(_shared) > KEPT:
            _shared.popitem(last=False)
    return function(_shared[path], item)

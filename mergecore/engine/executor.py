"""Executors run spans and evaluations: their interface, and the one with threads of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Protocol, TypeVar


class InProcess:
    """Runs items in this process: in threads, or one after another where there is one worker."""

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers

    def each(
        self, function: Any, shared: Any, items: Sequence[Any], at_once: int | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Do what `Executor.each` does. One worker takes the items in order."""
        workers = min(self.workers, at_once or self.workers)
        if workers == 1 or len(items) == 1:
            for position, item in enumerate(items):
                yield position, function(shared, item)
            return
        with ThreadPoolExecutor(workers) as pool:
            futures = {pool.submit(function, shared, item): position for position, item in enumerate(items)}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


Shared = TypeVar("Shared")
Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class Executor(Protocol):
    """Runs spans and evaluations: in this process or on a cluster."""

    workers: int
    """How many items run at a time."""

    def each(
        self,
        function: Callable[[Shared, Item], Outcome],
        shared: Shared,
        items: Sequence[Item],
        at_once: int | None = None,
    ) -> Iterator[tuple[int, Outcome]]:
        """Yield (position, function(shared, item)) as they complete. The first error is raised and ends it.

        All arguments are picklable; `shared` is sent once. at_once: how many may run at a time, None: `workers`.
        """
        ...

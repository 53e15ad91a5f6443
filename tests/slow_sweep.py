"""`mergeloom sweep` with small spans that are slow, so that a kill hits the middle. It is run as `python -m`.

Arguments: the spec, and the seconds that a span of a merge lasts. A worker in a span leaves `busy-<its process id>` in
the store.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from distributed import Client, Worker, WorkerPlugin

import flows.services.servers
import flows.sweep
import mergecore.engine.pass_plan
import mergecore.engine.span
import tasks.cluster.workers
from flows.cli.main import main
from tasks.cluster.workers import dask_client


def patiently() -> None:
    """Wait longer for services to come up: tests run on machines that are busy with other tests."""
    flows.services.servers.Service.wait.__defaults__ = (600.0,)
    tasks.cluster.workers.START_SECONDS = 600.0


class Slow(WorkerPlugin):
    """In every worker, those that replace a killed one included: a span waits before it is journalled."""

    name = "slow-spans"

    def __init__(self, folder: str, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds

    def setup(self, worker: Worker) -> None:
        """Called in the worker process. By value: everything it needs is imported here."""
        import os
        import time
        from pathlib import Path

        import mergecore.engine.pass_plan
        import mergecore.engine.span

        original, folder, seconds = mergecore.engine.span.write_journal, self.folder, self.seconds

        def slowly(*arguments: Any) -> None:
            mark = Path(folder) / f"busy-{os.getpid()}"
            mark.touch()
            time.sleep(seconds)
            original(*arguments)
            mark.unlink()

        mergecore.engine.span.write_journal = slowly


def run(spec: str, seconds: float) -> None:
    """The command line with the plug-in on every worker."""
    folder = yaml.safe_load(Path(spec).read_text())["output"]["store"]
    mergecore.engine.pass_plan.plan_spans.__defaults__ = (20_000,)
    patiently()

    @contextlib.contextmanager
    def slowed(*arguments: Any, **options: Any) -> Iterator[Client]:
        with dask_client(*arguments, **options) as client:
            client.register_plugin(Slow(folder, seconds))
            yield client

    flows.sweep.dask_client = slowed  # type: ignore[attr-defined]
    main(["sweep", spec])


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    run(sys.argv[1], float(sys.argv[2]))

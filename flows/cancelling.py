"""Cancelling: a flow run that someone cancels in Prefect stops between two items of work."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Iterator
from typing import Any

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext

POLL_SECONDS = 3.0


@contextlib.contextmanager
def cancelling(stop: threading.Event) -> Iterator[None]:
    """Inside the block, set `stop` within seconds after someone cancels the flow run in Prefect."""
    context = FlowRunContext.get()
    over = threading.Event()

    def watch(run_id: Any) -> None:
        with get_client(sync_client=True) as client:
            while not over.wait(POLL_SECONDS):
                try:
                    state = client.read_flow_run(run_id).state
                except Exception:  # the server may be away for a moment: cancelling then has to wait
                    continue
                if state is not None and (state.is_cancelling() or state.is_cancelled()):
                    stop.set()
                    return

    thread = None
    if context is not None and context.flow_run is not None:
        thread = threading.Thread(target=contextvars.copy_context().run, args=(watch, context.flow_run.id), daemon=True)
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread is not None:
            thread.join(timeout=10)

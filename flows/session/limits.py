"""Whether a plan fits: its memory, its disk, and a store that can be written."""

from __future__ import annotations

import os

from flows.session.settings import Settings
from mergecore.errors import CapacityError, StoreError
from mergecore.store.store import Store
from mergecore.sweeps.cost import Cost


def check_fit(settings: Settings, store: Store, costs: Cost) -> None:
    """Check that the plan fits.

    Raises CapacityError, which says which resource is short and by how much, and StoreError where the store cannot be
    written.
    """
    existing = next(path for path in (store.root, *store.root.parents) if os.path.lexists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise StoreError(
            f"the store {store.root} cannot be written: {existing} is no folder one may write to; choose "
            "another with `output.store`"
        )
    workers, memory, disk = settings.workers, settings.memory, settings.disk
    if costs.peak_memory > memory.value:
        raise CapacityError(
            f"the plan needs {readable(costs.peak_memory)} of memory at its peak with {workers.value} workers "
            f"({workers.origin}) and may use {readable(memory.value)} ({memory.origin}), "
            f"{readable(costs.peak_memory - memory.value)} too few; run fewer workers (run.workers) or raise run.memory"
        )
    if costs.disk > disk.value:
        worst = max(costs.passes, key=lambda one_pass: one_pass.disk)
        raise CapacityError(
            f"one pass ({worst.what}) takes {readable(worst.disk)} in {store.root} and {readable(disk.value)} may be "
            f"used ({disk.origin}), {readable(worst.disk - disk.value)} too few; free space, raise run.disk, or put "
            "the store elsewhere (output.store)"
        )


def readable(size: float) -> str:
    """Return bytes as people read them, in decimal units."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError

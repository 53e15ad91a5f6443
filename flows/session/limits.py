"""What a plan will cost: bytes read and written, peak memory, disk and expected time; and whether it fits here."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mergecore.errors import CapacityError, StoreError
from mergecore.spec.sizes import size_in_bytes
from mergecore.spec.sweep import Spec
from mergecore.store.store import Store
from mergecore.sweeps.cost import Cost


def memory_budget(spec: Spec) -> int:
    """Bytes a pass may use: the spec's, else half of what can be had now."""
    return size_in_bytes(spec.run.memory) if spec.run.memory else sensible_memory()


def sensible_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Half of the memory that can be had now: what is free and what the system would give up of its page cache.

    Free pages alone are few wherever files have been read, and a checkpoint has just been.
    """
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024 // 2
    except (OSError, ValueError, LookupError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def disk_budget(spec: Spec, store: Store) -> int:
    """Bytes that models under way may use: the spec's, else half of what is free on the store's disk."""
    if spec.run.disk:
        return size_in_bytes(spec.run.disk)
    folder = next(path for path in (store.root, *store.root.parents) if path.exists())
    return shutil.disk_usage(folder).free // 2


def check_fit(spec: Spec, store: Store, found: Cost) -> None:
    """Raise CapacityError where the plan cannot fit, saying which resource and by how much; StoreError where the store
    cannot be written."""
    there = next(path for path in (store.root, *store.root.parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise StoreError(
            f"the store {store.root} cannot be written: {there} is no folder one may write to; choose "
            "another with `output.store`"
        )
    memory, disk = memory_budget(spec), disk_budget(spec, store)
    if found.peak_memory > memory:
        raise CapacityError(
            f"the plan needs {readable(found.peak_memory)} of memory at its peak and may use {readable(memory)} "
            f"({readable(found.peak_memory - memory)} more than there is); run fewer workers (run.workers) or raise run.memory"
        )
    if found.disk > disk:
        worst = max(found.passes, key=lambda one: one.disk)
        raise CapacityError(
            f"one pass ({worst.what}) takes {readable(worst.disk)} in {store.root} and {readable(disk)} may be used "
            f"({readable(worst.disk - disk)} too few); free space, or put the store elsewhere (output.store)"
        )


def readable(size: float) -> str:
    """Bytes as people read them, decimal units."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))

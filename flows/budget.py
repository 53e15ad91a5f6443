"""What a plan will cost: bytes read and written, peak memory, disk and expected time; and whether it fits here."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from mergecore.errors import CapacityError, StoreError
from mergecore.frontier import Frontier
from mergecore.identity import GRID
from mergecore.method import DataStatistic, Per
from mergecore.passes import coarsest
from mergecore.plan import MergePlan, Plan
from mergecore.snapshot import DTYPES
from mergecore.span import WINDOW as CHUNK
from mergecore.spec import Spec, size_in_bytes
from mergecore.store import State, Store

EVALUATION_SECONDS_AN_ITEM = 0.05
"""What an item is expected to cost while nothing has been measured yet."""
BYTES_A_SECOND = 300e6
"""Reading, merging and writing, a core, likewise."""


@dataclass(frozen=True)
class Cost:
    """What is still to be done, in numbers."""

    cells: int
    cells_done: int
    statistics: int
    merges: int
    evaluations: int
    passes: int
    bytes_read: int
    bytes_written: int
    peak_memory: int
    disk: int
    seconds: float
    measured: bool
    """Whether the time is from what this store has measured."""


def memory_budget(spec: Spec) -> int:
    """Bytes a pass may use: the spec's, else half of what is free now."""
    if spec.run.memory:
        return size_in_bytes(spec.run.memory)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def disk_budget(spec: Spec, store: Store) -> int:
    """Bytes that models under way may use: the spec's, else half of what is free on the store's disk."""
    if spec.run.disk:
        return size_in_bytes(spec.run.disk)
    folder = next(path for path in (store.root, *store.root.parents) if path.exists())
    return shutil.disk_usage(folder).free // 2


def block_memory(plan: Plan, merges: list[MergePlan], workers: int) -> int:
    """Bytes that the blocks in flight take: raw pieces of every model of the pool, their float32 forms, the outputs."""
    if not merges:
        return 0
    per = coarsest([way.method for merge in merges for way in merge.ways])
    experts = len({one for merge in merges for one in merge.experts})
    sizes = [info.count for merge in merges for info in merge.outputs.values()]
    piece = min(GRID, max(sizes)) if per is Per.ELEMENT else max(sizes)
    raw = piece * (experts + 1) * 4
    wide = (CHUNK if per is Per.ELEMENT else piece) * 4 * (3 * experts + 4)
    return workers * (raw + wide + piece * 4 * len(merges))


def cost(frontier: Frontier, workers: int) -> Cost:
    """What the sweep will still cost. Baselines that are checkpoints as they stand need no merge."""
    plan, store = frontier.plan, frontier.store
    merges: dict[str, MergePlan] = {}
    statistics: dict[str, tuple[str, ...]] = {}
    evaluations = items = done = 0
    for cell in plan.cells:
        if frontier.trouble(cell):
            continue
        wanted = list(frontier.wanted(cell))
        done += not wanted
        evaluations += len(wanted)
        items += sum(identity.items for _, identity, _ in wanted)
        if wanted and cell.merge is not None and store.state(cell.model) is not State.PRESENT:
            merges[cell.model.key] = cell.merge
            for plans in cell.merge.statistics.values():
                for one in (inner for group in plans for inner in group.with_inputs()):
                    if not store.is_done(one.step, bytes_needed=True) and not isinstance(one.statistic, DataStatistic):
                        statistics[one.step.key] = one.experts
    room = min(frontier.room, len(merges)) or 1
    passes = -(-len(merges) // room)
    largest = max((merge.size for merge in merges.values()), default=0)
    snapshots = {member.id: member.snapshot.size for member in plan.pool.members}
    pool_bytes = sum(snapshots[one] for one in {one for merge in merges.values() for one in merge.experts})
    scanned = sum(snapshots[one] + plan.pool.base.size for ids in statistics.values() for one in ids)
    read = passes * (plan.pool.base.size + pool_bytes) + scanned
    written = sum(merge.size for merge in merges.values())
    an_item = measured_seconds_an_item(frontier)
    seconds = (items * (an_item or EVALUATION_SECONDS_AN_ITEM) + (read + written) / BYTES_A_SECOND) / workers
    evaluated = _evaluation_memory(plan)
    peak = max(block_memory(plan, list(merges.values())[:room], workers), workers * evaluated if evaluations else 0)
    return Cost(
        len(plan.cells), done, len(statistics), len(merges), evaluations, passes, read, written, peak, room * largest,
        seconds, an_item is not None,
    )  # fmt: skip


def _evaluation_memory(plan: Plan) -> int:
    """A resident model in float32 at most, and as much again for what it computes."""
    return 2 * sum(info.count * DTYPES["F32"].itemsize for info in plan.pool.base.tensors.values())


def measured_seconds_an_item(frontier: Frontier) -> float | None:
    """Seconds per scored item, from the evaluations this store holds; None where there are none."""
    seconds = items = 0.0
    for cell in frontier.plan.cells[:40]:
        for split in frontier.plan.splits:
            for task in cell.tasks:
                record = frontier.store.record(frontier.plan.evaluation(cell, split, task))
                if record is not None:
                    seconds += float(record.made.get("seconds", 0.0))
                    items += int(record.result.get("items", 0))
    return seconds / items if items else None


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
        raise CapacityError(
            f"one model at a time needs {readable(found.disk)} in {store.root} and {readable(disk)} may be used "
            f"({readable(found.disk - disk)} too few); free space, or put the store elsewhere (output.store)"
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


def folder_of(store: Store) -> Path:
    """The store's folder."""
    return store.root

"""What the rest of a sweep costs: bytes, memory, disk and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergecore.engine.memory import Models, block_bytes, blocks_in_flight, read_bytes
from mergecore.planning.cells import Plan
from mergecore.planning.pool import Pool
from mergecore.planning.work import Lane, MergeWork, Work
from mergecore.store.store import State
from mergecore.sweeps.remaining import Frontier
from mergecore.tensors.dtypes import ELEMENT_TYPES

EVALUATION_SECONDS_AN_ITEM = 0.05
"""What an item is expected to cost while nothing has been measured yet."""
BYTES_A_SECOND = 1e9
"""Reading, merging and writing, a core, likewise."""


@dataclass(frozen=True)
class PassCost:
    """One reading of a pool. read, written: bytes. block: bytes of memory for one block in flight. spans: blocks in
    flight.

    disk: bytes that its models take. seconds: expected time.
    """

    what: str
    read: int
    written: int
    block: int
    spans: int
    disk: int
    seconds: float

    @property
    def memory(self) -> int:
        """Bytes of all blocks in flight, beyond what the processes take anyway."""
        return self.block * self.spans


@dataclass(frozen=True)
class Cost:
    """What is still to do, in numbers."""

    cells: int
    cells_done: int
    statistics: int
    merges: int
    evaluations: int
    passes: tuple[PassCost, ...]
    peak_memory: int
    seconds: float
    measured: bool
    """Whether the time is from what this store has measured."""

    @property
    def bytes_read(self) -> int:
        """Bytes read in all passes."""
        return sum(planned.read for planned in self.passes)

    @property
    def bytes_written(self) -> int:
        """Bytes written in all passes."""
        return sum(planned.written for planned in self.passes)

    @property
    def disk(self) -> int:
        """Bytes that models take on the disk at a time, at most."""
        return max((planned.disk for planned in self.passes), default=0)


def cost(frontier: Frontier, workers: int, memory: int) -> Cost:
    """Return what the sweep will still cost. memory: bytes that one pass may use.

    Baselines that are checkpoints as they stand need no merge.
    """
    frontier.refresh()
    plan = frontier.plan
    merges: dict[str, MergeWork] = {}
    evaluations = items = done = 0
    for cell in plan.cells:
        if frontier.view.trouble(cell):
            continue
        wanted = list(frontier.choice.wanted(cell))
        done += not wanted
        evaluations += len(wanted)
        items += sum(identity.items for _, identity, _ in wanted)
        if wanted and cell.merge is not None and frontier.view.state(cell.model) is not State.PRESENT:
            merges[cell.model.key] = cell.merge
    statistics = {
        work.step.key: work
        for merge in merges.values()
        for work in merge.missing_inputs(frontier.view.at_hand)
        if work.lane is not Lane.MODELS  # what runs models is no pass; its time is not projected yet
    }
    passes = passes_of(plan.pool, list(merges.values()), list(statistics.values()), frontier.room, workers, memory)
    an_item = measured_seconds_an_item(frontier)
    scoring = items * (an_item or EVALUATION_SECONDS_AN_ITEM) / workers
    evaluated = workers * _evaluation_memory(plan) if evaluations else 0
    return Cost(
        cells=len(plan.cells),
        cells_done=done,
        statistics=len(statistics),
        merges=len(merges),
        evaluations=evaluations,
        passes=passes,
        peak_memory=max([evaluated, *(planned.memory for planned in passes)]),
        seconds=sum(planned.seconds for planned in passes) + scoring,
        measured=an_item is not None,
    )


def passes_of(
    pool: Pool,
    merges: Sequence[MergeWork],
    statistics: Sequence[Work],
    room: int,
    workers: int,
    memory: int,
) -> tuple[PassCost, ...]:
    """Return the passes that complete these statistics and merges.

    Statistics take one pass per level, since some need the results of others. room: merges in one pass at most. Nothing
    is
    raised: `check_fit` and the engine refuse what does not fit.
    """
    waiting, passes = {work.step.key: work for work in statistics}, []
    stays = chain_ends(merges).keys()
    lying: dict[str, int] = {}
    limits = Limits(workers, memory)
    while waiting:
        ready = [
            work
            for work in waiting.values()
            if not any(inner.step.key in waiting for group in work.inputs.values() for inner in group)
        ]
        experts = {expert for work in ready for expert in work.experts}
        # While a chain goes on the link before lies beside the one that is written.
        lying |= {work.step.key: work.size for work in ready if work.goes_on}
        shown_as = f"scan: {len(ready)} statistics of {len(experts)} experts"
        passes.append(_pass_cost(pool, shown_as, ready, sum(lying.values()), limits))
        for passed in (passed.step.key for work in ready for passed in work.passed_on):
            if passed not in stays:
                lying.pop(passed, None)
        waiting = {key: work for key, work in waiting.items() if work not in ready}
    for first in range(0, len(merges), max(room, 1)):
        together = merges[first : first + max(room, 1)]
        experts = {expert for merge in together for expert in merge.experts}
        shown_as = f"merge: {len(together)} model{'s' * (len(together) > 1)} of {len(experts)} experts"
        if len(together) < len(merges):
            shown_as += f" ({room} at a time)"
        disk = sum(merge.size for merge in together) + sum(lying.values())
        passes.append(_pass_cost(pool, shown_as, together, disk, limits))
    return tuple(passes)


def chain_ends(merges: Sequence[MergeWork]) -> dict[str, int]:
    """Return {key: bytes} of the links that models are read from. They stay, for experts that come later."""
    return {
        work.step.key: work.size
        for merge in merges
        for works in merge.inputs.values()
        for work in works
        if work.goes_on
    }


@dataclass(frozen=True)
class Limits:
    """What passes may use: worker processes, and bytes of memory."""

    workers: int
    memory: int


def _pass_cost(pool: Pool, shown_as: str, works: Sequence[Work], disk: int, limits: Limits) -> PassCost:
    experts = {expert for work in works for expert in work.experts}
    members = [member for member in pool.members if member.id in experts]
    full = tuple(member.snapshot.opened_tensors if member.factors is None else None for member in members)
    snapshots = (pool.base, *(member.snapshot for member in members if member.factors is None))
    gathered = any(snapshot.contents.gathers_rows for snapshot in snapshots)
    models = Models(pool.base.opened_tensors, full, gathered)
    methods = [way.method for work in works for way in work.ways]
    scans = [statistic for work in works for statistic in work.scans]
    beside = any(known.read_beside for work in works for group in work.inputs.values() for known in group)
    block = block_bytes(models, methods, scans, beside)
    spans = blocks_in_flight(block, limits.workers, limits.memory)
    adapters = sum(member.snapshot.size for member in members if member.factors is not None)
    read = read_bytes(models, {name for work in works for name in work.reads}, adapters)
    written = sum(work.size for work in works)
    return PassCost(shown_as, read, written, block, spans, disk, (read + written) / BYTES_A_SECOND / spans)


def _evaluation_memory(plan: Plan) -> int:
    """Return the bytes of a shell in float32, and as many for what it computes."""
    return 2 * sum(info.count * ELEMENT_TYPES["F32"].itemsize for info in plan.pool.base.tensors.values())


def measured_seconds_an_item(frontier: Frontier) -> float | None:
    """Return the seconds per scored item, from evaluations in this store; None where there are none."""
    seconds = items = 0.0
    for cell in frontier.plan.cells[:40]:
        for split in frontier.plan.splits:
            for task in cell.tasks_on(split):
                record = frontier.store.record(frontier.plan.evaluation(cell, split, task))
                if record is not None:
                    seconds += float(record.provenance.get("seconds", 0.0))
                    items += int(record.result.get("items", 0))
    return seconds / items if items else None

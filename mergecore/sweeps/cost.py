"""What the rest of a sweep costs: bytes, memory, disk and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergecore.engine.memory import Models, block_bytes, blocks_in_flight, read_bytes
from mergecore.planning.cells import Plan
from mergecore.planning.plans import MergePlan, StatisticPlan
from mergecore.planning.pool import Pool
from mergecore.plugins.adapter_method import AdapterMethod
from mergecore.plugins.chain import BEFORE, Link
from mergecore.plugins.method import Method
from mergecore.plugins.statistic import DataStatistic, Statistic
from mergecore.store.store import State
from mergecore.sweeps.remaining import Frontier
from mergecore.tensors.dtypes import ELEMENT_TYPES

EVALUATION_SECONDS_AN_ITEM = 0.05
"""What an item is expected to cost while nothing has been measured yet."""
BYTES_A_SECOND = 1e9
"""Reading, merging and writing, a core, likewise."""


@dataclass(frozen=True)
class PassCost:
    """One reading of a pool: bytes read and written, memory of one block in flight, how many of them at a time, disk that
    its models take, expected seconds."""

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
    """What is still to be done, in numbers."""

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
        """In all passes."""
        return sum(one.read for one in self.passes)

    @property
    def bytes_written(self) -> int:
        """In all passes."""
        return sum(one.written for one in self.passes)

    @property
    def disk(self) -> int:
        """The most that models take at a time."""
        return max((one.disk for one in self.passes), default=0)


def cost(frontier: Frontier, workers: int, memory: int) -> Cost:
    """Return what the sweep will still cost. memory: bytes that one pass may use.

    Baselines that are checkpoints as they stand need no merge.
    """
    frontier.refresh()
    plan = frontier.plan
    merges: dict[str, MergePlan] = {}
    evaluations = items = done = 0
    for cell in plan.cells:
        if frontier.trouble(cell):
            continue
        wanted = list(frontier.wanted(cell))
        done += not wanted
        evaluations += len(wanted)
        items += sum(identity.items for _, identity, _ in wanted)
        if wanted and cell.merge is not None and frontier.state(cell.model) is not State.PRESENT:
            merges[cell.model.key] = cell.merge
    statistics = {
        one.step.key: one
        for merge in merges.values()
        for one in merge.missing(frontier.at_hand)
        if not isinstance(one.statistic, DataStatistic)
    }
    passes = passes_of(plan.pool, list(merges.values()), list(statistics.values()), frontier.room, workers, memory)
    an_item = measured_seconds_an_item(frontier)
    scoring = items * (an_item or EVALUATION_SECONDS_AN_ITEM) / workers
    evaluated = workers * _evaluation_memory(plan) if evaluations else 0
    return Cost(
        len(plan.cells), done, len(statistics), len(merges), evaluations, passes,
        max([evaluated, *(one.memory for one in passes)]), sum(one.seconds for one in passes) + scoring, an_item is not None,
    )  # fmt: skip


def passes_of(
    pool: Pool,
    merges: Sequence[MergePlan],
    statistics: Sequence[StatisticPlan],
    room: int,
    workers: int,
    memory: int,
) -> tuple[PassCost, ...]:
    """The passes that complete these statistics (one per level, for some look at what others found) and merges (`room` at
    a time). Raises nothing: what does not fit is refused by `check_fit` and by the engine."""
    waiting, found = {one.step.key: one for one in statistics}, []
    ends = chain_ends(merges)
    lying: dict[str, int] = {}
    while waiting:
        ready = [
            one
            for one in waiting.values()
            if not any(inner.step.key in waiting for group in one.inputs.values() for inner in group)
        ]
        experts = {expert for one in ready for expert in one.experts}
        names = {name for one in ready if not isinstance(one.statistic, AdapterMethod) for name in one.selection}
        what = f"scan: {len(ready)} statistics of {len(experts)} experts"
        scans = [one.statistic for one in ready if isinstance(one.statistic, Statistic)]
        links = {one.step.key: one.written() for one in ready if isinstance(one.statistic, Link)}
        written = sum(link.size for link in links.values())
        methods = [link.method for link in links.values()]
        # While a chain goes on the link before lies beside the one that is written.
        lying |= {key: link.size for key, link in links.items()}
        disk = sum(lying.values())
        found.append(_pass_cost(pool, what, experts, names, methods, scans, written, disk, workers, memory))
        for passed in {
            before.step.key for key in links for before in waiting[key].inputs.get(BEFORE, ())
        } - ends.keys():
            lying.pop(passed, None)
        waiting = {key: one for key, one in waiting.items() if one not in ready}
    for first in range(0, len(merges), max(room, 1)):
        held = merges[first : first + max(room, 1)]
        experts = {expert for merge in held for expert in merge.experts}
        names = {name for merge in held for name in (*merge.layout.merged, *merge.layout.copied)}
        what = f"merge: {len(held)} model{'s' * (len(held) > 1)} of {len(experts)} experts"
        if len(held) < len(merges):
            what += f" ({room} at a time)"
        needs = [one.statistic for merge in held for group in merge.statistics.values() for one in group]
        data = [one for one in needs if isinstance(one, DataStatistic)]
        written = sum(merge.size for merge in held)
        methods = [way.method for merge in held for way in merge.ways]
        disk = written + sum(lying.values())
        found.append(_pass_cost(pool, what, experts, names, methods, data, written, disk, workers, memory))
    return tuple(found)


def chain_ends(merges: Sequence[MergePlan]) -> dict[str, int]:
    """Bytes of the links that models are read off, by key. They stay, for an expert who comes later."""
    return {
        one.step.key: one.written().size
        for merge in merges
        for group in merge.statistics.values()
        for one in group
        if isinstance(one.statistic, Link)
    }


def _pass_cost(
    pool: Pool,
    what: str,
    experts: set[str],
    names: set[str],
    methods: Sequence[Method | Link],
    statistics: Sequence[Statistic | DataStatistic],
    written: int,
    disk: int,
    workers: int,
    memory: int,
) -> PassCost:
    members = [member for member in pool.members if member.id in experts]
    full = tuple(member.snapshot.opened_tensors if member.factors is None else None for member in members)
    snapshots = (pool.base, *(member.snapshot for member in members if member.factors is None))
    gathered = any(snapshot.contents.gathers_rows for snapshot in snapshots)
    models = Models(pool.base.opened_tensors, full, gathered)
    block = block_bytes(models, methods, statistics)
    spans = blocks_in_flight(block, workers, memory)
    adapters = sum(member.snapshot.size for member in members if member.factors is not None)
    read = read_bytes(models, names, adapters)
    return PassCost(what, read, written, block, spans, disk, (read + written) / BYTES_A_SECOND / spans)


def _evaluation_memory(plan: Plan) -> int:
    """A resident model in float32 at most, and as much again for what it computes."""
    return 2 * sum(info.count * ELEMENT_TYPES["F32"].itemsize for info in plan.pool.base.tensors.values())


def measured_seconds_an_item(frontier: Frontier) -> float | None:
    """Seconds per scored item, from the evaluations this store holds; None where there are none."""
    seconds = items = 0.0
    for cell in frontier.plan.cells[:40]:
        for split in frontier.plan.splits:
            for task in cell.tasks_on(split):
                record = frontier.store.record(frontier.plan.evaluation(cell, split, task))
                if record is not None:
                    seconds += float(record.made.get("seconds", 0.0))
                    items += int(record.result.get("items", 0))
    return seconds / items if items else None

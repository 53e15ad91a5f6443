"""Merges inside this process, by the same steps as the command: for what only shows from within."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.loops import WatchedLibrary
from benchmarks.machine import cores
from benchmarks.models import model_folders, weights
from flows.session.session import resolver
from flows.session.settings import memory_setting
from mergecore.checkpoints.sources.digests import DigestCache
from mergecore.engine.executor import InProcess
from mergecore.events import Event, Report, silent
from mergecore.execution.fetch import fetch
from mergecore.execution.lanes import run_works
from mergecore.execution.outcome import Done
from mergecore.execution.place import Place, snapshots_of
from mergecore.native.library import Library
from mergecore.planning.merge_builder import MergeBuilder
from mergecore.planning.pool import Pool, resolve_pool
from mergecore.planning.work import MergeWork, Work
from mergecore.registry import method_from
from mergecore.spec.sources import BaseSpec, ExpertSpec, Resolver
from mergecore.store.store import State, Store
from mergecore.sweeps.cost import passes_of

SHARD = 5_000_000_000
"""Bytes of a shard, as a recipe has them."""


@functools.cache
def _resolver() -> Resolver:
    """One for the process: every file is hashed once."""
    return resolver(DigestCache())


def pool_in(folder: Path, experts: int) -> Pool:
    """The first experts over the base in a folder."""
    base, *others = [str(path) for path in model_folders(folder, experts)]
    specs = [ExpertSpec.model_validate(entry) for entry in others]
    return resolve_pool(BaseSpec(source=base), specs, None, _resolver(), silent)


def planned(pool: Pool, recipes: Sequence[Mapping[str, Any]]) -> list[MergeWork]:
    """The merges of all experts of a pool, in bfloat16; statistics that several need are one step."""
    builder = MergeBuilder(pool, (), "bfloat16", None)
    members = list(pool.experts.values())
    return [
        builder.build(
            method_from(recipe["method"], {key: value for key, value in recipe.items() if key != "method"}, "recipe"),
            members,
        )
        for recipe in recipes
    ]


def place_of(pool: Pool, store: Path, library: Library, workers: int, report: Report = silent) -> Place:
    """Where merges of the pool are done, with an empty store."""
    place = Place(
        pool, Store(store), InProcess(workers), report, SHARD, library=library, memory=memory_setting(None).value
    )
    for snapshot in snapshots_of(pool):
        fetch(place, snapshot)
    return place


def scan(place: Place, plans: Sequence[MergeWork]) -> int:
    """Complete everything the merges must know beforehand; returns how often the pool was read for it at least."""
    waiting: dict[str, Work] = {work.step.key: work for plan in plans for work in plan.needed}
    readings = 0
    while waiting:
        ready = [
            work
            for work in waiting.values()
            if not any(inner.step.key in waiting for group in work.inputs.values() for inner in group)
        ]
        _settled(run_works(place, ready))
        waiting = {key: work for key, work in waiting.items() if place.store.state(work.step) is not State.PRESENT}
        readings += 1
    return readings


def merge(place: Place, plans: Sequence[MergeWork]) -> list[str]:
    """Complete the merges in one pass; returns the models' digests."""
    _settled(run_works(place, plans))
    return [place.store.record(plan.step).digest for plan in plans]  # type: ignore[union-attr]


def _settled(done: Done) -> None:
    """End the benchmark where a step failed: the engine would go on with each alone."""
    if done.failures:
        raise SystemExit("; ".join(done.failures.values()))


def _note(event: Event, read: list[float]) -> None:
    """Elements of a reading that has come to its end."""
    if event.activity == "reading" and event.done >= event.total:
        read.append(event.total)


@dataclass(frozen=True)
class Known:
    """What is known of a merge before it is timed: seconds that building its loops took and how many there are,
    CPU-seconds in loops that count and that store, the files that each of its passes reads, and bytes that it
    writes.
    """

    built: int
    build: float
    counting: float
    storing: float
    readings: tuple[tuple[Path, ...], ...]
    planned_read: int
    written: int

    @property
    def fused(self) -> bool:
        """Whether there are loops: methods that see whole tensors have none."""
        return self.storing > 0


def known_of(folder: Path, recipe: Mapping[str, Any], experts: int, library: WatchedLibrary, store: Path) -> Known:
    """Plan a merge and do it once, on one thread, so that loops are built and their time is theirs alone."""
    pool = pool_in(folder, experts)
    (plan,) = planned(pool, [recipe])
    needed = list(plan.needed)
    costs = passes_of(pool, [plan], needed, 1, cores(), memory_setting(None).value)
    library.watch.cleared()
    read: list[float] = []
    place = place_of(pool, store, library, 1, lambda event: _note(event, read))
    scan(place, [plan])
    scans = sum(elements > sum(info.count for info in pool.base.tensors.values()) / 2 for elements in read)
    merge(place, [plan])
    watch, (base, *others) = library.watch, [weights(path) for path in model_folders(folder, experts)]
    # Scans that look at changes read the base; those and merges that work on weights alone do not, whatever is planned.
    # A scan that the one before it has made needless is none, and so is a look into a few blocks.
    with_base, without = (base, *others), tuple(others)
    changes = any(statistic.on == "deltas" for work in needed for statistic in work.scans)
    readings = [with_base if changes else without] * scans + [with_base if plan.method.needs_base else without]
    return Known(
        len(watch.built), sum(watch.built), watch.seconds["count"], watch.seconds["store"], tuple(readings),
        sum(cost.read for cost in costs), sum(cost.written for cost in costs),
    )  # fmt: skip

"""A pass: reads the models of a pool once, block by block, and completes many merges and statistics on the way.

A pass is scheduling, never identity: each job's bytes are those of its lone run, for any company, chunk, span, order
and number of workers. What a worker needs is in the pickled `PassPlan`; a span is a list of blocks of it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from mergecore.architectures import layer_of
from mergecore.delta import Expert
from mergecore.errors import NonFiniteError
from mergecore.identity import GRID, digest, model_digest, tensor_digest
from mergecore.method import (
    Block,
    Event,
    Method,
    Per,
    Report,
    Rescan,
    Result,
    Statistic,
    Statistics,
    TensorInfo,
    TensorSource,
)
from mergecore.snapshot import DTYPES, check_finite
from mergecore.store import write_json
from mergecore.writer import Sink

CHUNK = 1 << 16
"""Elements an element-wise method sees at once: base, eight experts and temporaries stay in the processor's cache."""
KEEP_OUT = (
    "repair the checkpoint, or leave the tensor as the base has it: select: [{{names: '{name}', take: copy}}, {{}}]"
)
TAME = "its experts are finite, its result is not: choose a smaller scale or a wider dtype"
"""What to do about values that are not finite: in a model that is read, in a result."""
SPAN_BYTES = 64 << 20
"""Bytes of the base that one span covers, about: large enough that scheduling it costs nothing beside reading it."""

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class Executor(Protocol):
    """Where spans and evaluations run: in this process or on a cluster."""

    workers: int
    """How many items run at once."""

    def each(
        self, function: Callable[[Shared, Item], Outcome], shared: Shared, items: Sequence[Item]
    ) -> Iterator[tuple[int, Outcome]]:
        """(position, function(shared, item)) as they complete; the first error ends it. All arguments are picklable,
        `shared` is sent once."""
        ...


@dataclass(frozen=True)
class MergeJob:
    """One model to be made: `outputs` are its tensors, of which `merged` are the method's and the rest are copied."""

    key: str
    method: Method
    experts: tuple[int, ...]
    merged: frozenset[str]
    outputs: Mapping[str, TensorInfo]
    statistics: Statistics
    sink: Sink
    journal: Path | None = None


@dataclass(frozen=True)
class StatisticJob:
    """One statistic to be found, over the tensors of `selection`."""

    key: str
    statistic: Statistic
    experts: tuple[int, ...]
    selection: Mapping[str, TensorInfo]
    statistics: Statistics


Piece = tuple[str, int, int]
"""Tensor, first element, end: whole blocks of the grid."""
Unit = tuple[Piece, ...]
"""What the most demanding method of the pass must see at once."""
Span = tuple[Unit, ...]


@dataclass(frozen=True)
class PassPlan:
    """Everything a worker needs to do any span of the pass. Picklable."""

    base: TensorSource
    experts: tuple[Expert, ...]
    merges: tuple[MergeJob, ...]
    statistics: tuple[StatisticJob, ...]
    spans: tuple[Span, ...]
    device: str = "cpu"


@dataclass(frozen=True)
class SpanTask:
    """One span to be done: its number, the statistics' states to start from, and for a rescan which tensors to read."""

    number: int
    only: frozenset[str] | None


@dataclass
class SpanOutcome:
    """What a span gives back: digests of the blocks it wrote, per merge, and the states of the statistics."""

    digests: dict[str, dict[str, dict[int, str]]] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)


@dataclass
class PassOutcome:
    """What a pass completed: per merge {tensor: digest} and the model's digest, per statistic its result."""

    tensors: dict[str, dict[str, str]] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)


def plan_spans(tensors: Mapping[str, TensorInfo], per: Per, size: int = SPAN_BYTES) -> tuple[Span, ...]:
    """Units of what `per` must see at once, in name order, gathered into spans of about `size` bytes of the base."""
    spans: list[Span] = []
    units: list[Unit] = []
    filled = 0
    for unit in _units(tensors, per):
        units.append(unit)
        filled += sum((stop - start) * DTYPES[tensors[name].dtype].itemsize for name, start, stop in unit)
        if filled >= size:
            spans.append(tuple(units))
            units, filled = [], 0
    if units:
        spans.append(tuple(units))
    return tuple(spans)


def _units(tensors: Mapping[str, TensorInfo], per: Per) -> Iterator[Unit]:
    names = sorted(tensors)
    if per is Per.ELEMENT:
        for name in names:
            count = tensors[name].count
            for start in range(0, max(count, 1), GRID):
                yield ((name, start, min(start + GRID, count)),)
        return
    groups: dict[str, list[Piece]] = {}
    for name in names:
        layer = layer_of(name)
        key = "" if per is Per.MODEL else str(layer) if per is Per.LAYER and layer is not None else name
        groups.setdefault(key, []).append((name, 0, tensors[name].count))
    for pieces in groups.values():
        yield tuple(pieces)


def coarsest(methods: Sequence[Method]) -> Per:
    """What the most demanding of the methods must see at once."""
    order = list(Per)
    return max((method.per for method in methods), key=order.index, default=Per.ELEMENT)


class Reading:
    """One piece of every model of the pool, read when first asked for; float32 forms are shared by all jobs."""

    def __init__(self, plan: PassPlan, name: str, start: int, stop: int) -> None:
        self.plan, self.name, self.start, self.stop = plan, name, start, stop
        self.shape = tuple(plan.base.tensors[name].shape)
        self._raw_base: Tensor | None = None
        self._held: dict[int, Tensor] = {}
        self._wide: dict[tuple[str, int, int, int], Tensor] = {}

    def raw_base(self) -> Tensor:
        """The base in its own dtype."""
        if self._raw_base is None:
            self._raw_base = self.plan.base.read(self.name, self.start, self.stop)
        return self._raw_base

    def forget(self) -> None:
        """Drop the float32 forms of the last chunk."""
        self._wide.clear()

    def base(self, start: int, stop: int) -> Tensor:
        """Base elements in float32, checked to be finite."""
        return self._form(
            "base", -1, start, stop, lambda: self._moved(self.raw_base()[self._slice(start, stop)]).to(torch.float32)
        )

    def expert(self, on: str, position: int, start: int, stop: int) -> Tensor:
        """An expert's weights or delta in float32, checked to be finite."""
        expert = self.plan.experts[position]
        if position not in self._held:
            self._held[position] = expert.block(self.name, self.start, self.stop)
        held = self._moved(self._held[position][self._slice(start, stop)])
        if on == "weights" and expert.complete:
            return self._form(on, position, start, stop, lambda: held.to(torch.float32))
        form = expert.weights if on == "weights" else expert.delta
        return self._form(on, position, start, stop, lambda: form(held, self.base(start, stop)))

    def _moved(self, values: Tensor) -> Tensor:
        return values.to(self.plan.device)

    def _slice(self, start: int, stop: int) -> slice:
        return slice(start - self.start, stop - self.start)

    def _form(self, what: str, position: int, start: int, stop: int, make: Callable[[], Tensor]) -> Tensor:
        key = (what, position, start, stop)
        if key not in self._wide:
            values = make()
            owner = "the base" if position < 0 else f"expert '{self.plan.experts[position].name}'"
            check_finite(values, self.name, owner, KEEP_OUT.format(name=self.name))
            self._wide[key] = values
        return self._wide[key]

    def block(self, on: str, with_base: bool, positions: Sequence[int], start: int, stop: int, flat: bool) -> Block:
        """What a kernel sees of elements start … stop−1."""
        base = self.base(start, stop) if with_base else None
        experts = tuple(self.expert(on, position, start, stop) for position in positions)
        if not flat:
            base = None if base is None else base.view(self.shape)
            experts = tuple(values.view(self.shape) for values in experts)
        ids = tuple(self.plan.experts[position].id for position in positions)
        return Block(self.name, self.shape, start, stop, base, experts, ids)


@dataclass(frozen=True)
class Round:
    """One reading of the pass: the plan and the states from which every span's statistics start."""

    plan: PassPlan
    states: Mapping[str, Any]


def run_span(round: Round, task: SpanTask) -> SpanOutcome:
    """Do one span: every merge that has not journalled it, and every statistic that has a state in this round.

    Raises NonFiniteError naming tensor and expert, or tensor and method.
    """
    torch.set_num_threads(
        1
    )  # sums differ in their last bits between one thread and two; spans are what runs in parallel
    plan, span, outcome = round.plan, round.plan.spans[task.number], SpanOutcome()
    open_merges = []
    for job in plan.merges if task.only is None else ():
        found = read_journal(job, span)
        outcome.digests[job.key] = found or {}
        if found is None:
            open_merges.append(job)
    observers = [job for job in plan.statistics if job.key in round.states]
    outcome.states = {job.key: copy.deepcopy(round.states[job.key]) for job in observers}
    with torch.inference_mode():
        for unit in span:
            readings = [Reading(plan, *piece) for piece in unit if task.only is None or piece[0] in task.only]
            for reading in readings:
                for watcher in observers:
                    if reading.name in watcher.selection:
                        _observe(watcher, reading, outcome.states)
                _merge_piece(open_merges, reading, outcome)
            for job in open_merges:
                if job.method.per is not Per.ELEMENT:
                    _merge_whole(job, readings, outcome)
    for job in open_merges:
        write_journal(job, span, outcome.digests[job.key])
    return outcome


def _observe(job: StatisticJob, reading: Reading, states: dict[str, Any]) -> None:
    """Show a statistic the piece, block by block of the grid: its sums must not depend on any other cut."""
    for start in range(reading.start, reading.stop, GRID):
        stop = min(start + GRID, reading.stop)
        try:
            block = reading.block("deltas", False, job.experts, start, stop, flat=True)
        except NonFiniteError:
            if not job.statistic.whole:
                raise
            # It looks beyond the selection: values there must not stop a merge that leaves the tensor out. Where the
            # tensor is selected, the merge itself reads it and refuses it.
            reading.forget()
            continue
        states[job.key] = job.statistic.add(states[job.key], block, job.statistics)
        reading.forget()


def _merge_piece(jobs: Sequence[MergeJob], reading: Reading, outcome: SpanOutcome) -> None:
    """Every merge's share of one piece: element-wise methods chunk by chunk, and what is copied."""
    buffers: dict[str, Tensor] = {}
    for job in jobs:
        copied = reading.name in job.outputs and reading.name not in job.merged
        if copied or (job.method.per is Per.ELEMENT and reading.name in job.merged):
            dtype = DTYPES[job.outputs[reading.name].dtype]
            buffers[job.key] = torch.empty(reading.stop - reading.start, dtype=dtype)
            if copied:
                buffers[job.key].copy_(reading.raw_base())
    merging = [job for job in jobs if job.key in buffers and reading.name in job.merged]
    chunk = CHUNK if reading.plan.device == "cpu" else GRID
    for start in range(reading.start, reading.stop, chunk):
        stop = min(start + chunk, reading.stop)
        for job in merging:
            block = reading.block(job.method.on, job.method.needs_base, job.experts, start, stop, flat=True)
            merged = job.method.merge_block(block, job.statistics)[reading.name].reshape(-1)
            rounded = buffers[job.key][start - reading.start : stop - reading.start].copy_(merged)
            _check_result(job, reading.name, rounded)
        reading.forget()
    for job in jobs:
        if job.key in buffers:
            _emit(job, reading.name, reading.start, buffers[job.key], outcome)


def _merge_whole(job: MergeJob, readings: Sequence[Reading], outcome: SpanOutcome) -> None:
    """A method that sees a tensor, a layer or the model: its outputs may have other names and shapes than its inputs."""
    method = job.method
    blocks = []
    for reading in readings:
        if reading.name in job.merged:
            shown = reading.block(method.on, method.needs_base, job.experts, reading.start, reading.stop, flat=False)
            blocks.append(shown)
            reading.forget()
    if method.per is not Per.TENSOR and blocks:
        blocks = [Block(blocks[0].name, (), 0, 0, None, (), blocks[0].ids, tuple(blocks))]
    for block in blocks:
        for name, values in method.merge_block(block, job.statistics).items():
            rounded = values.reshape(-1).to("cpu", DTYPES[job.outputs[name].dtype])
            _check_result(job, name, rounded)
            _emit(job, name, 0, rounded, outcome)


def _check_result(job: MergeJob, name: str, values: Tensor) -> None:
    if values.is_floating_point():
        check_finite(values, name, f"method '{job.method.name}'", TAME)


def _emit(job: MergeJob, name: str, start: int, values: Tensor, outcome: SpanOutcome) -> None:
    job.sink.write(name, start, values)
    outcome.digests[job.key].setdefault(name, {}).update(block_digests(values, start))


def block_digests(values: Tensor, start: int) -> dict[int, str]:
    """SHA-256 of each block of the grid of flat `values` that begin at element `start`."""
    found = {}
    for at in range(0, max(values.numel(), 1), GRID):
        data = values[at : at + GRID].contiguous().view(torch.uint8).numpy()
        found[start + at] = hashlib.sha256(data.data).hexdigest()
    return found


def _journal_entry(job: MergeJob, span: Span) -> Path:
    """Named by what the span covers, so that a pass cut otherwise never takes another span's word."""
    assert job.journal is not None
    return job.journal / f"{digest([list(piece) for unit in span for piece in unit])[:24]}.json"


def read_journal(job: MergeJob, span: Span) -> dict[str, dict[int, str]] | None:
    """The digests of a span that an earlier try of this merge has finished, None where it has not."""
    if job.journal is None:
        return None
    try:
        held = json.loads(_journal_entry(job, span).read_text())
    except (OSError, ValueError):
        return None
    return {name: {int(start): found for start, found in blocks.items()} for name, blocks in held.items()}


def write_journal(job: MergeJob, span: Span, digests: Mapping[str, Mapping[int, str]]) -> None:
    """Note that a span's bytes are in their place."""
    if job.journal is not None:
        held = {name: {str(start): found for start, found in blocks.items()} for name, blocks in digests.items()}
        write_json(_journal_entry(job, span), held)


def run_pass(plan: PassPlan, executor: Executor, report: Report) -> PassOutcome:
    """Complete every job of the plan: one reading for all of them, and rescans where a statistic asks for one."""
    outcome = PassOutcome()
    states = {job.key: job.statistic.begin(job.selection, job.statistics) for job in plan.statistics}
    digests: dict[str, dict[str, dict[int, str]]] = {job.key: {} for job in plan.merges}
    tasks = [SpanTask(number, None) for number in range(len(plan.spans))]
    for job in plan.merges:
        job.sink.prepare()
    while tasks:
        gathered = _read_round(Round(plan, states), tasks, executor, report)
        for number in sorted(gathered):
            for key, held in gathered[number].digests.items():
                for name, blocks in held.items():
                    digests[key].setdefault(name, {}).update(blocks)
        states, names = _finish_round(plan, states, gathered, outcome)
        tasks = [
            SpanTask(number, names)
            for number, span in enumerate(plan.spans)
            if any(name in names for unit in span for name, _, _ in unit)
        ]
    for job in plan.merges:
        found = {
            name: tensor_digest([blocks[at] for at in sorted(blocks)]) for name, blocks in digests[job.key].items()
        }
        outcome.tensors[job.key] = found
        outcome.models[job.key] = model_digest({n: (i.dtype, i.shape, found[n]) for n, i in job.outputs.items()})
    return outcome


def _read_round(round: Round, tasks: Sequence[SpanTask], executor: Executor, report: Report) -> dict[int, SpanOutcome]:
    gathered: dict[int, SpanOutcome] = {}
    sizes = [sum(stop - start for unit in span for _, start, stop in unit) for span in round.plan.spans]
    total = sum(sizes[task.number] for task in tasks)
    done = 0
    for position, found in executor.each(run_span, round, tasks):
        gathered[tasks[position].number] = found
        done += sizes[tasks[position].number]
        report(Event("reading", done, total, "elements"))
    return gathered


def _finish_round(
    plan: PassPlan, states: Mapping[str, Any], gathered: Mapping[int, SpanOutcome], outcome: PassOutcome
) -> tuple[dict[str, Any], frozenset[str]]:
    """Join the spans' states in order; returns the states of statistics that read again, and the tensors they name."""
    again: dict[str, Any] = {}
    names: set[str] = set()
    for job in plan.statistics:
        if job.key not in states:
            continue
        parts = [gathered[number].states[job.key] for number in sorted(gathered)]
        joined = parts[0]
        for part in parts[1:]:
            joined = job.statistic.combine(joined, part)
        finished = job.statistic.finish(joined, job.selection, job.statistics)
        if isinstance(finished, Rescan):
            again[job.key] = finished.state
            names |= set(job.selection if finished.tensors is None else finished.tensors)
        else:
            outcome.results[job.key] = finished
    return again, frozenset(names)

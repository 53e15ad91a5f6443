"""One span of a pass, in the process and thread it is called in: every block read once, every job done on it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergecore.errors import NonFiniteError
from mergecore.identity import GRID, BlockDigests
from mergecore.journal import read_journal, write_journal
from mergecore.kernels.run import HALF, Fused
from mergecore.kernels.source import BINS
from mergecore.method import Block, Counting, Per, Sparse
from mergecore.passes import MergeJob, PassPlan, Round, SpanOutcome, SpanTask, StatisticJob
from mergecore.reading import Reading, buffer
from mergecore.snapshot import DTYPES, check_finite

WINDOW = 1 << 18
"""Elements of every model that are at hand at once: what lies between reading and writing stays in the processor's cache."""
WORTH_BUILDING = 1 << 24
"""Elements of a pass from which on a fused loop that is not at hand is built."""
TAME = "its experts are finite, its result is not: choose a smaller scale or a wider dtype"
"""What to do about values of a result that are not finite."""


def run_span(round: Round, task: SpanTask) -> SpanOutcome:
    """Do one span: every merge that has not journalled it, and every statistic that has a state in this round.

    Raises NonFiniteError naming tensor and expert, or tensor and method.
    """
    # Sums differ in their last bits between one thread and two; spans are what runs in parallel.
    torch.set_num_threads(1)
    plan, span, outcome = round.plan, round.plan.spans[task.number], SpanOutcome()
    open_merges = []
    for job in plan.merges if task.only is None else ():
        found = read_journal(job, span)
        outcome.digests[job.key] = found or {}
        if found is None:
            open_merges.append(job)
    observers = [job for job in plan.statistics if job.key in round.states]
    outcome.states = {job.key: copy.deepcopy(round.states[job.key]) for job in observers}
    work = _Work(round, outcome, open_merges, observers)
    with torch.inference_mode():
        for unit in span:
            readings = [Reading(plan, *piece) for piece in unit if task.only is None or piece[0] in task.only]
            for reading in readings:
                work.observe(reading)
                work.merge(reading)
            for job in open_merges:
                if job.method.per is not Per.ELEMENT:
                    work.merge_whole(job, readings)
        work.count_up()
    for job in open_merges:
        write_journal(job, span, outcome.digests[job.key])
    return outcome


@dataclass
class _Work:
    """The jobs of one span, and what is between two blocks: counts of the tensor under way, digests of the block."""

    round: Round
    outcome: SpanOutcome
    merges: list[MergeJob]
    observers: list[StatisticJob]
    bins: dict[str, tuple[str, tuple[int, ...] | None, NDArray[np.uint32]]] = field(default_factory=dict)

    @property
    def plan(self) -> PassPlan:
        """The pass."""
        return self.round.plan

    # --- statistics ---------------------------------------------------------------------------------------------

    def observe(self, reading: Reading) -> None:
        """Show every statistic the piece: fused counts window by window, the rest block by block of the grid, for their
        sums must not depend on any other cut."""
        watching = [job for job in self.observers if reading.name in job.selection]
        counts = [job for job in watching if self._counting(job, reading) is not None]
        for job in (job for job in watching if job not in counts):
            for start, stop in _cut(reading, GRID):
                reading.window(start, stop)
                self._add(job, reading)
        for start, stop in _cut(reading, WINDOW) if counts else ():
            reading.window(start, stop)
            for job in counts:
                self._count(job, reading)

    def _counting(self, job: StatisticJob, reading: Reading) -> Counting | None:
        return job.statistic.counting(self.outcome.states[job.key], reading.place(job.experts), job.statistics)

    def _add(self, job: StatisticJob, reading: Reading) -> None:
        try:
            block = reading.block("deltas", False, job.experts, flat=True)
        except NonFiniteError:
            if not job.statistic.whole:
                raise
            # It looks beyond the selection: values there must not stop a merge that leaves the tensor out. Where the
            # tensor is selected, the merge itself reads it and refuses it.
            return
        self.outcome.states[job.key] = job.statistic.add(self.outcome.states[job.key], block, job.statistics)

    def _count(self, job: StatisticJob, reading: Reading) -> None:
        counting = self._counting(job, reading)
        assert counting is not None
        if counting.windows == ():
            return
        held = self.bins.get(job.key)
        if held is None or held[0] != reading.name:
            self._count_up(job)
            size = BINS * len(counting.windows or (0,))
            held = self.bins[job.key] = (reading.name, counting.windows, np.zeros(size, dtype=np.uint32))
        windows = counting.windows or ()
        fused = self._fused(("count", job.key), counting.pattern, "deltas", None, len(windows))
        chunk = reading.chunk(job.experts, with_base=True)
        if fused.counted(chunk, counting.arguments, windows, held[2]) and not job.statistic.whole:
            reading.block("deltas", True, job.experts, flat=True)  # which says what is not finite, and where

    def count_up(self) -> None:
        """Hand over what was counted of the last tensor of each scan."""
        for job in self.observers:
            self._count_up(job)

    def _count_up(self, job: StatisticJob) -> None:
        held = self.bins.pop(job.key, None)
        if held is not None:
            tensor, windows, bins = held
            first = 0 if windows else -HALF
            counts = [_sparse(part, first) for part in bins.reshape(-1, BINS)]
            self.outcome.states[job.key] = job.statistic.counted(self.outcome.states[job.key], tensor, counts)

    # --- merges -------------------------------------------------------------------------------------------------

    def merge(self, reading: Reading) -> None:
        """Every merge's share of one piece: element-wise methods window by window, and what is copied."""
        copying = [job for job in self.merges if reading.name in job.outputs and reading.name not in job.merged]
        merging = [job for job in self.merges if job.method.per is Per.ELEMENT and reading.name in job.merged]
        if not copying and not merging:
            return
        digests = {job.key: BlockDigests(reading.start) for job in (*copying, *merging)}
        for start, stop in _cut(reading, WINDOW):
            reading.window(start, stop)
            for job in copying:
                target = self._target(job, reading.name, stop - start).copy_(reading.raw_base())
                self._emit(job, reading.name, start, target, digests[job.key])
            for job in merging:
                target = self._target(job, reading.name, stop - start)
                self._merge_window(job, reading, start, stop, target)
                self._emit(job, reading.name, start, target, digests[job.key])
        for job in (*copying, *merging):
            self.outcome.digests[job.key].setdefault(reading.name, {}).update(digests[job.key].finished())

    def _target(self, job: MergeJob, name: str, count: int) -> Tensor:
        return buffer("write", count, DTYPES[job.outputs[name].dtype])

    def _merge_window(self, job: MergeJob, reading: Reading, start: int, stop: int, target: Tensor) -> None:
        method = job.method
        fused = self._fused(("merge", job.key, target.dtype), method.merge, method.on, target.dtype)
        arguments = method.arguments(reading.place(job.experts), job.statistics)
        chunk = reading.chunk(job.experts, method.needs_base)
        read, made = fused.stored(chunk, arguments, target)
        if read:
            reading.block(method.on, method.needs_base, job.experts, flat=True)  # which says what is not finite
        if made:
            check_finite(target, reading.name, f"method '{method.name}'", TAME)

    def _emit(self, job: MergeJob, name: str, start: int, values: Tensor, digests: BlockDigests) -> None:
        digests.update(values)
        job.sink.write(name, start, values)

    def merge_whole(self, job: MergeJob, readings: Sequence[Reading]) -> None:
        """A method that sees a tensor, a layer or the model: its outputs may have other names and shapes than its inputs."""
        method, blocks = job.method, []
        for reading in readings:
            if reading.name in job.merged:
                reading.window(reading.start, reading.stop)
                reading.reuse = method.per is Per.TENSOR  # else several tensors are held at once
                blocks.append(reading.block(method.on, method.needs_base, job.experts, flat=False))
        if method.per is not Per.TENSOR and blocks:
            blocks = [Block(blocks[0].name, (), 0, 0, None, (), blocks[0].ids, tuple(blocks))]
        for block in blocks:
            for name, values in method.merge_block(block, job.statistics).items():
                rounded = values.reshape(-1).to("cpu", DTYPES[job.outputs[name].dtype])
                if rounded.is_floating_point():
                    check_finite(rounded, name, f"method '{method.name}'", TAME)
                digests = BlockDigests(0)
                self._emit(job, name, 0, rounded, digests)
                self.outcome.digests[job.key].setdefault(name, {}).update(digests.finished())

    # --- fused loops --------------------------------------------------------------------------------------------

    def _fused(self, key: Any, function: Any, on: Any, out: torch.dtype | None, windows: int = 0) -> Fused:
        key = (*key, windows)
        if key not in self.round.fused:
            build = _elements(self.plan) >= WORTH_BUILDING
            self.round.fused[key] = Fused(function, on, out, self.plan.library, build, windows=windows)
        found: Fused = self.round.fused[key]
        return found


def _elements(plan: PassPlan) -> int:
    return sum(stop - start for span in plan.spans for unit in span for _, start, stop in unit)


def _cut(reading: Reading, size: int) -> Iterator[tuple[int, int]]:
    for start in range(reading.start, reading.stop, size):
        yield start, min(start + size, reading.stop)


def _sparse(counts: NDArray[np.uint32], first: int) -> Sparse:
    occupied = counts.nonzero()[0]
    return occupied.astype(np.int64) + first, counts[occupied].astype(np.int64)

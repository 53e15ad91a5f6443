"""One span of a pass, in the process and thread it is called in: every block read once, every job done on it."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergecore.engine.device_windows import Launched, Stage, in_smaller_windows
from mergecore.engine.journal import read_journal, write_journal
from mergecore.engine.kernels.run import HALF, Chunk, Fused, Given, counts_of, empty_bins, total_of
from mergecore.engine.kernels.source import LANES, Out
from mergecore.engine.memory import pass_models
from mergecore.engine.pass_plan import MergeJob, PassPlan, Round, SpanOutcome, StatisticJob
from mergecore.engine.windows import Readers, Reading, Space, _cut, space
from mergecore.errors import NonFiniteError
from mergecore.identity.content import GRID, BlockDigests
from mergecore.plugins.block import Block, Per
from mergecore.plugins.method import Method
from mergecore.plugins.statistic import Counting, Sparse, Summing
from mergecore.tensors.dtypes import DTYPES
from mergecore.tensors.finite import TAME, check_finite

WORTH_BUILDING = 1 << 24
"""Elements of a pass from which on a fused loop that is not at hand is built."""
LEFT_OUT = 1 << 14
"""Elements that a scan beyond selections leaves out where one of them is not finite."""
ON_DEVICE = 1 << 20
"""Elements of a window on a device, where they fit."""


def run_span(round: Round, number: int) -> SpanOutcome:
    """Do one span: every merge that has not journalled it, and every statistic that has a state in this round.

    Raises NonFiniteError naming tensor and expert, or tensor and method.
    """
    # Sums differ in their last bits between one thread and two; spans are what runs in parallel.
    torch.set_num_threads(1)
    plan, span, outcome = round.plan, round.plan.spans[number], SpanOutcome()
    open_merges = []
    for job in plan.merges if round.only is None else ():
        found = read_journal(job, span)
        outcome.digests[job.key] = found or {}
        if found is None:
            open_merges.append(job)
    observers = [job for job in plan.statistics if job.key in round.states]
    outcome.states = {job.key: pickle.loads(round.states[job.key]) for job in observers}
    work = _Work(round, outcome, open_merges, observers)
    with torch.inference_mode():
        units = [wanted for unit in span if (wanted := round.wanted(unit))]
        readers = Readers(plan, pass_models(plan).window)
        for place, unit in enumerate(units):
            if place + 1 < len(units):
                readers.expect(units[place + 1])
            readings = [Reading(readers, *piece) for piece in unit]
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
class _Counted:
    """Counts of a part of a tensor under way: of which scans, how many results each has, and the bins."""

    tensor: str
    jobs: list[tuple[StatisticJob, int]]
    windows: int
    bins: NDArray[np.uint32]


@dataclass
class _Work:
    """The jobs of one span, and what is between two blocks: counts of the tensor under way, digests of the block."""

    round: Round
    outcome: SpanOutcome
    merges: list[MergeJob]
    observers: list[StatisticJob]
    counted: dict[Any, _Counted] = field(default_factory=dict)

    @property
    def plan(self) -> PassPlan:
        """The pass."""
        return self.round.plan

    # --- statistics ---------------------------------------------------------------------------------------------

    def observe(self, reading: Reading) -> None:
        """Show every statistic the piece: counts window by window, all scans that count by one function in one loop; the
        rest block by block of the grid, for their sums must not depend on any other cut."""
        groups: dict[Any, list[tuple[StatisticJob, Counting]]] = {}
        sums: dict[Any, list[tuple[StatisticJob, Summing]]] = {}
        for job in self.observers:
            if reading.name not in job.selection or reading.start == reading.stop:
                continue
            place = reading.place(job.experts)
            summing = job.statistic.summing(self.outcome.states[job.key], place, job.statistics)
            if summing is not None:
                alike = (summing.values, job.statistic.whole, job.statistic.on, summing.with_base, summing.grain)
                sums.setdefault(alike, []).append((job, summing))
                continue
            counting = job.statistic.counting(self.outcome.states[job.key], place, job.statistics)
            if counting is None:
                for start, stop in _cut(reading.start, reading.stop, GRID):
                    reading.window(start, stop)
                    self._add(job, reading)
            elif counting.windows != ():
                per = len(counting.windows[0]) if counting.windows else 0
                kind = (counting.patterns, per, job.statistic.whole)
                groups.setdefault(kind, []).append((job, counting))
        for (_, per, whole), group in groups.items():
            self._count(reading, group, per, whole)
        for adding in sums.values():
            self._sum(reading, reading.start, reading.stop, adding)

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

    def _riding(
        self,
        scans: Sequence[tuple[StatisticJob, Callable[..., Sequence[Tensor]], Mapping[str, Any]]],
        out: Out,
        per: int = 0,
        with_base: bool = False,
    ) -> tuple[list[int], Given]:
        """Scans (job, function, arguments) in one loop: the experts that it reads, and the loop."""
        positions = sorted({position for job, _, _ in scans for position in job.experts})
        function = _together([(one, [positions.index(p) for p in job.experts]) for job, one, _ in scans], with_base)
        on = scans[0][0].statistic.on
        fused = self._fused((out, tuple(job.key for job, _, _ in scans)), function, on, out, per)
        return positions, fused.given({f"job {number}": given for number, (_, _, given) in enumerate(scans)})

    def _sum(self, reading: Reading, first: int, end: int, group: list[tuple[StatisticJob, Summing]]) -> None:
        """The sums over blocks from `first` on, for scans that add up by one function, of the same things, in one loop."""
        statistic, with_base = group[0][0].statistic, group[0][1].with_base
        whole, on = statistic.whole, statistic.on
        needed = with_base or on == "deltas"
        scans = [(job, one.values, one.arguments) for job, one in group]
        positions, given = self._riding(scans, "sums", with_base=with_base)
        grain, window = group[0][1].grain or GRID, reading.readers.window
        blocks = list(_cut(first, end, grain))
        lanes = np.zeros((len(blocks), sum(one.results for _, one in group), LANES))
        lost = [False] * len(blocks)
        for start, stop in _cut(first, end, window // grain * grain or grain):
            for low, high in _cut(start, stop, window):
                reading.window(low, high)
                for at, _, part in reading.chunk(positions, needed).parts(grain):
                    number = (low + at - first) // grain
                    lost[number] |= given.sum(part, lanes[number])
        for (start, stop), not_finite, found in zip(blocks, lost, total_of(lanes), strict=True):
            if not_finite and not whole:
                reading.window(start, stop)
                reading.block(on, needed, positions, flat=True)  # which says what is not finite, and where
            elif not_finite and len(group) > 1:  # one expert's trouble is not the others'; its own block is left out
                for alone in group:
                    self._sum(reading, start, stop, [alone])
            elif not not_finite:
                every = iter(found)
                for job, one in group:
                    own = list(islice(every, one.results))
                    state = self.outcome.states[job.key]
                    self.outcome.states[job.key] = job.statistic.summed(state, reading.name, start, own)

    def _count(self, reading: Reading, group: list[tuple[StatisticJob, Counting]], per: int, whole: bool) -> None:
        positions, given = self._riding([(job, one.patterns, one.arguments) for job, one in group], "counts", per)
        key = tuple(job.key for job, _ in group)
        windows = [window for _, one in group for result in one.windows or () for window in result]
        for start, stop in reading.windows():
            bins = self._bins(reading.name, key, group, per)
            if given.count(reading.chunk(positions, with_base=True), windows, bins):
                if not whole:
                    reading.block("deltas", True, positions, flat=True)  # which says what is not finite, and where
                for low, high in _cut(start, stop, LEFT_OUT):
                    reading.window(low, high)
                    for one in group:
                        self._count_window(reading, one, per)

    def _count_window(self, reading: Reading, one: tuple[StatisticJob, Counting], per: int) -> None:
        """The window alone for one scan that looks beyond selections; where it is not finite it is left out: one expert's
        trouble is not the others', and what is left out must not depend on how many are read."""
        job, counting = one
        function = _together([(counting.patterns, list(range(len(job.experts))))], with_base=False)
        given = Fused(function, "deltas", "counts", None, windows=per).given({"job 0": counting.arguments})
        bins = empty_bins(counting.results, per)
        given.count(reading.chunk(job.experts, with_base=True), [w for r in counting.windows or () for w in r], bins)
        self._hand_over(_Counted(reading.name, [(job, counting.results)], per, bins))

    def _bins(self, tensor: str, key: Any, group: list[tuple[StatisticJob, Counting]], per: int) -> NDArray[np.uint32]:
        held = self.counted.get(key)
        if held is None or held.tensor != tensor:
            if held is not None:
                self._hand_over(held)
            jobs = [(job, one.results) for job, one in group]
            held = _Counted(tensor, jobs, per, empty_bins(sum(results for _, results in jobs), per))
            self.counted[key] = held
        return held.bins

    def count_up(self) -> None:
        """Hand over what was counted of the last tensors."""
        for held in self.counted.values():
            self._hand_over(held)
        self.counted.clear()

    def _hand_over(self, held: _Counted) -> None:
        counts = [_sparse(part, 0 if held.windows else -HALF) for part in counts_of(held.bins, held.windows)]
        for job, results in held.jobs:
            own, counts = counts[: results * max(held.windows, 1)], counts[results * max(held.windows, 1) :]
            state = self.outcome.states[job.key]
            self.outcome.states[job.key] = job.statistic.counted(state, held.tensor, own)

    # --- merges -------------------------------------------------------------------------------------------------

    def merge(self, reading: Reading) -> None:
        """Every merge's share of one piece: element-wise methods window by window, and what is copied."""
        copying = [job for job in self.merges if reading.name in job.outputs and reading.name not in job.merged]
        merging = [job for job in self.merges if job.method.per is Per.ELEMENT and reading.name in job.merged]
        given = {job.key: self._given(job, reading) for job in merging}
        digests = {job.key: BlockDigests(reading.start) for job in (*copying, *merging)}
        for start, stop in reading.windows() if copying else ():
            for job in copying:
                target = self._target(job, reading.name, stop - start)
                target.values.copy_(reading.raw_base())
                self._emit(job, reading.name, start, target, digests[job.key])
        if merging and self.plan.device == "cpu":
            for start, stop in reading.windows():
                for job in merging:
                    target = self._target(job, reading.name, stop - start)
                    chunk = reading.chunk(job.experts, job.method.needs_base)
                    self._settle(job, reading, *given[job.key].store(chunk, target.values), target.values)
                    self._emit(job, reading.name, start, target, digests[job.key])
        elif merging:
            stage = self._stage()
            in_smaller_windows(
                lambda size: self._merge_staged(merging, reading, given, digests, stage, size), ON_DEVICE, stage
            )
        for key, found in digests.items():
            self.outcome.digests[key].setdefault(reading.name, {}).update(found.finished())

    def _settle(self, job: MergeJob, reading: Reading, read: bool, made: bool, values: Tensor) -> None:
        """Raise NonFiniteError where a model or the result is not finite, saying which and where."""
        if read:
            reading.block(job.method.on, job.method.needs_base, job.experts, flat=True)
        if made:
            check_finite(values, reading.name, f"method '{job.method.name}'", TAME)

    def _stage(self) -> Stage:
        held: dict[str, Stage] = _stages.__dict__
        name = str(torch.device(self.plan.device))
        if name not in held:
            held[name] = Stage(torch.device(name))
        return held[name]

    def _merge_staged(
        self,
        jobs: Sequence[MergeJob],
        reading: Reading,
        given: Mapping[str, Given],
        digests: dict[str, BlockDigests],
        stage: Stage,
        size: int,
    ) -> None:
        """The piece on a device, window by window: one is written here while the next is worked out there."""
        for job in jobs:  # a try in larger windows may have begun
            digests[job.key] = BlockDigests(reading.start)
        under_way: list[tuple[MergeJob, int, int, Launched, Space]] = []
        for number, (start, stop) in enumerate(_cut(reading.start, reading.stop, size)):
            slot = number % 2
            reading.window(start, stop, slot)
            begun = []
            for place, job in enumerate(jobs):
                chunk = self._on_device(job, reading, stage, start, stop)
                dtype = DTYPES[job.outputs[reading.name].dtype]
                host = space(("write", place, slot), stop - start, dtype, stage.device.type == "cuda")
                begun.append((job, start, stop, stage.launch(given[job.key], chunk, dtype, host.values), host))
            self._land(under_way, reading, digests)
            under_way = begun
        self._land(under_way, reading, digests)

    def _on_device(self, job: MergeJob, reading: Reading, stage: Stage, start: int, stop: int) -> Chunk:
        keep, experts = self.plan.base_id, self.plan.experts

        def held(model: str, read: Callable[[], Tensor]) -> Tensor:
            return stage.held((keep, model, reading.name, start) if keep else None, stop - start, read)

        deltas = tuple(not experts[one].complete for one in job.experts)
        needed = job.method.needs_base or any(deltas)
        base = held("base", reading.raw_base) if needed else None
        moved = [held(experts[one].id, lambda one=one: reading.raw_expert(one)) for one in job.experts]  # type: ignore[misc]
        return Chunk(base, tuple(moved), deltas, start)

    def _land(
        self,
        under_way: Sequence[tuple[MergeJob, int, int, Launched, Space]],
        reading: Reading,
        digests: Mapping[str, BlockDigests],
    ) -> None:
        for job, start, stop, launched, host in under_way:
            values, read, made = launched.ready()
            if read or made:
                reading.window(start, stop, 2)
            self._settle(job, reading, read, made, values)
            self._emit(job, reading.name, start, host, digests[job.key])

    def _given(self, job: MergeJob, reading: Reading) -> Given:
        method, dtype = job.method, DTYPES[job.outputs[reading.name].dtype]
        assert isinstance(method, Method)  # a link sees whole tensors
        fused = self._fused(("merge", job.key, dtype), method.merge, method.on, dtype)
        return fused.given(method.arguments(reading.place(job.experts), job.statistics))

    def _target(self, job: MergeJob, name: str, count: int) -> Space:
        return space("write", count, DTYPES[job.outputs[name].dtype])

    def _emit(self, job: MergeJob, name: str, start: int, made: Space, digests: BlockDigests) -> None:
        digests.update(made.bytes, made.count)
        job.sink.write(name, start, made.bytes)

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
                self._emit(job, name, 0, Space(rounded), digests)
                self.outcome.digests[job.key].setdefault(name, {}).update(digests.finished())

    # --- fused loops --------------------------------------------------------------------------------------------

    def _fused(self, key: Any, function: Any, on: Any, out: Out, windows: int = 0) -> Fused:
        key = (*key, windows)
        if key not in self.round.fused:
            build = self.plan.elements >= WORTH_BUILDING
            self.round.fused[key] = Fused(function, on, out, self.plan.library, build, windows=windows)
        found: Fused = self.round.fused[key]
        return found


_stages = threading.local()
"""Per thread its way to a device."""


def _together(
    scans: Sequence[tuple[Callable[..., Sequence[Tensor]], list[int]]], with_base: bool
) -> Callable[..., list[Tensor]]:
    """One function that gives the results of several scans, each of its own experts (and before them the base)."""

    def results(base: Tensor | None, experts: Sequence[Tensor], **arguments: Any) -> list[Tensor]:
        found: list[Tensor] = []
        for number, (one, places) in enumerate(scans):
            first = [base] if with_base and base is not None else []
            found += one([*first, *(experts[place] for place in places)], **arguments[f"job {number}"])
        return found

    return results


def _sparse(counts: NDArray[np.uint32], first: int) -> Sparse:
    occupied = np.flatnonzero(counts != 0)  # of truth values: an eighth of the time that numbers take
    return occupied.astype(np.int64) + first, counts[occupied].astype(np.int64)

"""What the statistics of a pass observe in one span: counts, sums, and whole grid blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mergecore.engine.kernels.run import HALF, BoundFunction, Fused, counts_of, empty_bins, total_of
from mergecore.engine.kernels.source import LANES, Out
from mergecore.engine.loops import Loops
from mergecore.engine.pass_plan import StatisticJob
from mergecore.engine.windows import Reading, cut
from mergecore.errors import NonFiniteError
from mergecore.identity.content import GRID
from mergecore.plugins.statistic import Blocks, Counts, Look, SparseCounts, Sums

LEFT_OUT = 1 << 14
"""Elements that a scan beyond selections leaves out where one of them is not finite."""

CountScan = tuple[StatisticJob, Counts]
SumScan = tuple[StatisticJob, Sums]


class Scans:
    """The statistics of one span: shows each reading to all of them."""

    def __init__(self, loops: Loops, jobs: Sequence[StatisticJob], states: dict[str, Any]) -> None:
        self._jobs, self._states = jobs, states
        self._counting = CountingScans(loops, states)
        self._adding = AddingScans(loops, states)

    def observe(self, reading: Reading) -> None:
        """Show the reading to every statistic; counts and sums by the same function are done in one loop."""
        counts: dict[Any, list[CountScan]] = {}
        sums: dict[Any, list[SumScan]] = {}
        for job in self._jobs:
            if reading.name not in job.selection or reading.start == reading.stop:
                continue
            look = self._look(job, reading)
            match look:
                case Sums():
                    key = (look.values, job.statistic.whole, job.statistic.on, look.with_base, look.window)
                    sums.setdefault(key, []).append((job, look))
                case Counts():
                    kind = (look.patterns, _bins_per_result(look), job.statistic.whole)
                    counts.setdefault(kind, []).append((job, look))
                case Blocks():
                    self._hand_over(job, reading)
        for count_scans in counts.values():
            self._counting.count(reading, count_scans)
        for sum_scans in sums.values():
            self._adding.add(reading, reading.start, reading.stop, sum_scans)

    def finish(self) -> None:
        """Hand over what was counted of the last tensors."""
        self._counting.finish()

    def _look(self, job: StatisticJob, reading: Reading) -> Look | None:
        look = job.statistic.look(self._states[job.key], reading.without_values(job.experts), job.statistics)
        if look is not None and type(look) not in job.statistic.looks:
            kind, name = type(job.statistic).__name__, type(look).__name__
            raise TypeError(f"{kind}.look returned {name} for tensor '{reading.name}': add {name} to {kind}.looks")
        return look

    def _hand_over(self, job: StatisticJob, reading: Reading) -> None:
        """Grid block by grid block: what a statistic makes of one must not depend on how the pass is cut."""
        for start, stop in cut(reading.start, reading.stop, GRID):
            reading.window(start, stop)
            try:
                block = reading.block("deltas", False, job.experts, flat=True)
            except NonFiniteError:
                if not job.statistic.whole:
                    raise
                # It looks beyond the selection: values there must not stop a merge that leaves the tensor out. Where
                # the tensor is selected, the merge itself reads it and refuses it.
                continue
            self._states[job.key] = job.statistic.add(self._states[job.key], block, job.statistics)


class AddingScans:
    """Sums of values, one per grid block (or per window of it)."""

    def __init__(self, loops: Loops, states: dict[str, Any]) -> None:
        self._loops, self._states = loops, states

    def add(self, reading: Reading, first: int, end: int, scans: Sequence[SumScan]) -> None:
        """Hand over the sums of elements first … end−1, for scans of one function over the same things."""
        (job, sums), *others = scans
        statistic, window = job.statistic, sums.window or GRID
        needed = sums.with_base or statistic.on == "deltas"
        functions = [(job, sums.values, sums.arguments) for job, sums in scans]
        positions, loop = _loop_of(self._loops, functions, "sums", with_base=sums.with_base)
        blocks = list(cut(first, end, window))
        lanes, lost = self._lanes(reading, positions, needed, loop, blocks, sum(sums.results for _, sums in scans))
        for (start, stop), not_finite, totals in zip(blocks, lost, total_of(lanes), strict=True):
            if not_finite and not statistic.whole:
                reading.window(start, stop)
                reading.block(statistic.on, needed, positions, flat=True)  # which says what is not finite, and where
            elif not_finite and others:  # one expert's trouble is not the others'; its own block is left out
                for scan in scans:
                    self.add(reading, start, stop, [scan])
            elif not not_finite:
                rest = iter(totals)
                for job, sums in scans:
                    own = list(islice(rest, sums.results))
                    state = self._states[job.key]
                    self._states[job.key] = job.statistic.summed(state, reading.name, start, own)

    def _lanes(
        self,
        reading: Reading,
        positions: Sequence[int],
        with_base: bool,
        loop: BoundFunction,
        blocks: Sequence[tuple[int, int]],
        results: int,
    ) -> tuple[NDArray[np.float64], list[bool]]:
        """Per block and result the sums, LANES of them; and per block whether an input is not finite."""
        lanes, lost = np.zeros((len(blocks), results, LANES)), [False] * len(blocks)
        (first, stop), end = blocks[0], blocks[-1][1]
        window, at_hand = stop - first, reading.readers.window
        for start, stop in cut(first, end, at_hand // window * window or window):
            for low, high in cut(start, stop, at_hand):
                reading.window(low, high)
                for offset, _, part in reading.stored(positions, with_base).parts(window):
                    number = (low + offset - first) // window
                    lost[number] |= loop.sum(part, lanes[number])
        return lanes, lost


@dataclass
class TensorCounts:
    """Counts of a part of a tensor under way. jobs: the scans, and how many results each has; per_result: its bins."""

    tensor: str
    jobs: list[tuple[StatisticJob, int]]
    per_result: int
    bins: NDArray[np.uint32]


class CountingScans:
    """Counts of bit patterns: kept for the tensor that is under way, handed over once the next one begins."""

    def __init__(self, loops: Loops, states: dict[str, Any]) -> None:
        self._loops, self._states = loops, states
        self._under_way: dict[tuple[str, ...], TensorCounts] = {}

    def count(self, reading: Reading, scans: Sequence[CountScan]) -> None:
        """Count the reading, for scans of one function with the same number of bins per result."""
        functions = [(job, counts.patterns, counts.arguments) for job, counts in scans]
        per_result, whole = _bins_per_result(scans[0][1]), scans[0][0].statistic.whole
        positions, loop = _loop_of(self._loops, functions, "counts", per_result)
        key = tuple(job.key for job, _ in scans)
        wanted = [high for _, counts in scans for bins in counts.bins or () for high in bins]
        for start, stop in reading.windows():
            bins = self._bins(reading.name, key, scans, per_result)
            if loop.count(reading.stored(positions, with_base=True), wanted, bins):
                if not whole:
                    reading.block("deltas", True, positions, flat=True)  # which says what is not finite, and where
                for low, high in cut(start, stop, LEFT_OUT):
                    reading.window(low, high)
                    for scan in scans:
                        self._count_alone(reading, scan, per_result)

    def finish(self) -> None:
        """Hand over what was counted of the last tensors."""
        for counts in self._under_way.values():
            self._hand_over(counts)
        self._under_way.clear()

    def _count_alone(self, reading: Reading, scan: CountScan, per_result: int) -> None:
        """Count the window for one scan that looks beyond selections, or leave it out where it is not finite.

        One expert's trouble is not the others', and what is left out must not depend on how many are read.
        """
        job, counts = scan
        function = _together([(counts.patterns, list(range(len(job.experts))))], with_base=False)
        fused = Fused(function, "deltas", "counts", None, slots=per_result, with_base=False)
        loop = fused.bind([counts.arguments])
        bins = empty_bins(counts.results, per_result)
        wanted = [high for bins_of_result in counts.bins or () for high in bins_of_result]
        loop.count(reading.stored(job.experts, with_base=True), wanted, bins)
        self._hand_over(TensorCounts(reading.name, [(job, counts.results)], per_result, bins))

    def _bins(
        self, tensor: str, key: tuple[str, ...], scans: Sequence[CountScan], per_result: int
    ) -> NDArray[np.uint32]:
        counts = self._under_way.get(key)
        if counts is None or counts.tensor != tensor:
            if counts is not None:
                self._hand_over(counts)
            jobs = [(job, counts.results) for job, counts in scans]
            bins = empty_bins(sum(results for _, results in jobs), per_result)
            counts = self._under_way[key] = TensorCounts(tensor, jobs, per_result, bins)
        return counts.bins

    def _hand_over(self, counts: TensorCounts) -> None:
        per_result = counts.per_result
        results = [_sparse(bins, 0 if per_result else -HALF) for bins in counts_of(counts.bins, per_result)]
        for job, count in counts.jobs:
            own, results = results[: count * max(per_result, 1)], results[count * max(per_result, 1) :]
            state = self._states[job.key]
            self._states[job.key] = job.statistic.counted(state, counts.tensor, own)


def _bins_per_result(counts: Counts) -> int:
    """0 where high half-words are counted."""
    return len(counts.bins[0]) if counts.bins else 0


Scan = tuple[StatisticJob, Callable[..., Sequence[Tensor]], Mapping[str, Any]]
"""A statistic, its function of flat tensors, and the arguments of the function."""


def _loop_of(
    loops: Loops, scans: Sequence[Scan], out: Out, bins: int = 0, with_base: bool = False
) -> tuple[list[int], BoundFunction]:
    """Scans in one loop: the experts that it reads, and the loop."""
    positions = sorted({position for job, _, _ in scans for position in job.experts})
    function = _together(
        [(values, [positions.index(position) for position in job.experts]) for job, values, _ in scans], with_base
    )
    key = (out, tuple(job.key for job, _, _ in scans))
    fused = loops.fused(key, function, scans[0][0].statistic.on, out, with_base, bins)
    return positions, fused.bind([arguments for _, _, arguments in scans])


def _together(
    scans: Sequence[tuple[Callable[..., Sequence[Tensor]], list[int]]], with_base: bool
) -> Callable[..., list[Tensor]]:
    """One function that gives the results of several scans, each of its own experts (and before them the base)."""

    def results(models: Sequence[Tensor], arguments: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        base, experts = models[:with_base], models[with_base:]
        values: list[Tensor] = []
        for (function, positions), own in zip(scans, arguments, strict=True):
            values += function([*base, *(experts[position] for position in positions)], **own)
        return values

    return results


def _sparse(counts: NDArray[np.uint32], first: int) -> SparseCounts:
    occupied = np.flatnonzero(counts != 0)  # of truth values: an eighth of the time that numbers take
    return occupied.astype(np.int64) + first, counts[occupied].astype(np.int64)

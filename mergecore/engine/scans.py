"""What the statistics of a pass observe in one span: counts, sums, and whole grid blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mergecore.engine.kernels.run import HALF, Fused, Given, counts_of, empty_bins, total_of
from mergecore.engine.kernels.source import LANES, Out
from mergecore.engine.loops import Loops
from mergecore.engine.pass_plan import StatisticJob
from mergecore.engine.windows import Reading, cut
from mergecore.errors import NonFiniteError
from mergecore.identity.content import GRID
from mergecore.plugins.statistic import Counting, Sparse, Summing

LEFT_OUT = 1 << 14
"""Elements that a scan beyond selections leaves out where one of them is not finite."""

Scan = tuple[StatisticJob, Callable[..., Sequence[Tensor]], Mapping[str, Any]]
"""A statistic, its function of flat tensors, and the arguments of the function."""


class Scans:
    """The statistics of one span: shows each reading to all of them, counts first."""

    def __init__(self, loops: Loops, jobs: Sequence[StatisticJob], states: dict[str, Any]) -> None:
        self._jobs, self._states = jobs, states
        self._counts = Counts(loops, states)
        self._sums = Sums(loops, states)

    def observe(self, reading: Reading) -> None:
        """Show every statistic the reading: counts window by window, all scans that count by one function in one loop; the
        rest block by block of the grid, for their sums must not depend on any other cut."""
        counts: dict[Any, list[tuple[StatisticJob, Counting]]] = {}
        sums: dict[Any, list[tuple[StatisticJob, Summing]]] = {}
        for job in self._jobs:
            if reading.name not in job.selection or reading.start == reading.stop:
                continue
            block = reading.place(job.experts)
            summing = job.statistic.summing(self._states[job.key], block, job.statistics)
            if summing is not None:
                alike = (summing.values, job.statistic.whole, job.statistic.on, summing.with_base, summing.grain)
                sums.setdefault(alike, []).append((job, summing))
                continue
            counting = job.statistic.counting(self._states[job.key], block, job.statistics)
            if counting is None:
                for start, stop in cut(reading.start, reading.stop, GRID):
                    reading.window(start, stop)
                    self._add(job, reading)
            elif counting.windows != ():
                windows = len(counting.windows[0]) if counting.windows else 0
                kind = (counting.patterns, windows, job.statistic.whole)
                counts.setdefault(kind, []).append((job, counting))
        for (_, windows, whole), group in counts.items():
            self._counts.count(reading, group, windows, whole)
        for group_of_sums in sums.values():
            self._sums.sum(reading, reading.start, reading.stop, group_of_sums)

    def finish(self) -> None:
        """Hand over what was counted of the last tensors."""
        self._counts.finish()

    def _add(self, job: StatisticJob, reading: Reading) -> None:
        try:
            block = reading.block("deltas", False, job.experts, flat=True)
        except NonFiniteError:
            if not job.statistic.whole:
                raise
            # It looks beyond the selection: values there must not stop a merge that leaves the tensor out. Where the
            # tensor is selected, the merge itself reads it and refuses it.
            return
        self._states[job.key] = job.statistic.add(self._states[job.key], block, job.statistics)


class Sums:
    """Sums of values, per grid block (or per grain)."""

    def __init__(self, loops: Loops, states: dict[str, Any]) -> None:
        self._loops, self._states = loops, states

    def sum(self, reading: Reading, first: int, end: int, group: list[tuple[StatisticJob, Summing]]) -> None:
        """Hand over the sums from `first` to `end`, for scans that add up by one function, of the same things."""
        statistic, with_base = group[0][0].statistic, group[0][1].with_base
        whole, on = statistic.whole, statistic.on
        needed = with_base or on == "deltas"
        scans = [(job, summing.values, summing.arguments) for job, summing in group]
        positions, loop = _loop_of(self._loops, scans, "sums", with_base=with_base)
        grain, window = group[0][1].grain or GRID, reading.readers.window
        blocks = list(cut(first, end, grain))
        lanes = np.zeros((len(blocks), sum(summing.results for _, summing in group), LANES))
        lost = [False] * len(blocks)
        for start, stop in cut(first, end, window // grain * grain or grain):
            for low, high in cut(start, stop, window):
                reading.window(low, high)
                for at, _, part in reading.chunk(positions, needed).parts(grain):
                    number = (low + at - first) // grain
                    lost[number] |= loop.sum(part, lanes[number])
        for (start, stop), not_finite, sums in zip(blocks, lost, total_of(lanes), strict=True):
            if not_finite and not whole:
                reading.window(start, stop)
                reading.block(on, needed, positions, flat=True)  # which says what is not finite, and where
            elif not_finite and len(group) > 1:  # one expert's trouble is not the others'; its own block is left out
                for alone in group:
                    self.sum(reading, start, stop, [alone])
            elif not not_finite:
                rest = iter(sums)
                for job, summing in group:
                    own = list(islice(rest, summing.results))
                    state = self._states[job.key]
                    self._states[job.key] = job.statistic.summed(state, reading.name, start, own)


@dataclass
class TensorCounts:
    """Counts of a part of a tensor under way: of which scans, how many results each has, and the bins."""

    tensor: str
    jobs: list[tuple[StatisticJob, int]]
    windows: int
    bins: NDArray[np.uint32]


class Counts:
    """Counts of bit patterns: kept for the tensor that is under way, handed over once the next one begins."""

    def __init__(self, loops: Loops, states: dict[str, Any]) -> None:
        self._loops, self._states = loops, states
        self._under_way: dict[tuple[str, ...], TensorCounts] = {}

    def count(self, reading: Reading, group: list[tuple[StatisticJob, Counting]], windows: int, whole: bool) -> None:
        """Count the reading for scans that count by one function. windows: per result, 0 for high half-words."""
        scans = [(job, counting.patterns, counting.arguments) for job, counting in group]
        positions, loop = _loop_of(self._loops, scans, "counts", windows)
        key = tuple(job.key for job, _ in group)
        wanted = [window for _, counting in group for result in counting.windows or () for window in result]
        for start, stop in reading.windows():
            bins = self._bins(reading.name, key, group, windows)
            if loop.count(reading.chunk(positions, with_base=True), wanted, bins):
                if not whole:
                    reading.block("deltas", True, positions, flat=True)  # which says what is not finite, and where
                for low, high in cut(start, stop, LEFT_OUT):
                    reading.window(low, high)
                    for job, counting in group:
                        self._count_alone(reading, job, counting, windows)

    def finish(self) -> None:
        """Hand over what was counted of the last tensors."""
        for counts in self._under_way.values():
            self._hand_over(counts)
        self._under_way.clear()

    def _count_alone(self, reading: Reading, job: StatisticJob, counting: Counting, windows: int) -> None:
        """The window alone for one scan that looks beyond selections; where it is not finite it is left out: one expert's
        trouble is not the others', and what is left out must not depend on how many are read."""
        function = _together([(counting.patterns, list(range(len(job.experts))))], with_base=False)
        loop = Fused(function, "deltas", "counts", None, windows=windows).given({"job 0": counting.arguments})
        bins = empty_bins(counting.results, windows)
        wanted = [window for result in counting.windows or () for window in result]
        loop.count(reading.chunk(job.experts, with_base=True), wanted, bins)
        self._hand_over(TensorCounts(reading.name, [(job, counting.results)], windows, bins))

    def _bins(
        self, tensor: str, key: tuple[str, ...], group: list[tuple[StatisticJob, Counting]], windows: int
    ) -> NDArray[np.uint32]:
        counts = self._under_way.get(key)
        if counts is None or counts.tensor != tensor:
            if counts is not None:
                self._hand_over(counts)
            jobs = [(job, counting.results) for job, counting in group]
            bins = empty_bins(sum(results for _, results in jobs), windows)
            counts = self._under_way[key] = TensorCounts(tensor, jobs, windows, bins)
        return counts.bins

    def _hand_over(self, counts: TensorCounts) -> None:
        results = [_sparse(bins, 0 if counts.windows else -HALF) for bins in counts_of(counts.bins, counts.windows)]
        for job, count in counts.jobs:
            own, results = results[: count * max(counts.windows, 1)], results[count * max(counts.windows, 1) :]
            state = self._states[job.key]
            self._states[job.key] = job.statistic.counted(state, counts.tensor, own)


def _loop_of(
    loops: Loops, scans: Sequence[Scan], out: Out, windows: int = 0, with_base: bool = False
) -> tuple[list[int], Given]:
    """Scans in one loop: the experts that it reads, and the loop."""
    positions = sorted({position for job, _, _ in scans for position in job.experts})
    function = _together(
        [(values, [positions.index(position) for position in job.experts]) for job, values, _ in scans], with_base
    )
    key = (out, tuple(job.key for job, _, _ in scans))
    fused = loops.fused(key, function, scans[0][0].statistic.on, out, windows)
    return positions, fused.given({f"job {number}": arguments for number, (_, _, arguments) in enumerate(scans)})


def _together(
    scans: Sequence[tuple[Callable[..., Sequence[Tensor]], list[int]]], with_base: bool
) -> Callable[..., list[Tensor]]:
    """One function that gives the results of several scans, each of its own experts (and before them the base)."""

    def results(base: Tensor | None, experts: Sequence[Tensor], **arguments: Any) -> list[Tensor]:
        values: list[Tensor] = []
        for number, (function, positions) in enumerate(scans):
            first = [base] if with_base and base is not None else []
            values += function([*first, *(experts[position] for position in positions)], **arguments[f"job {number}"])
        return values

    return results


def _sparse(counts: NDArray[np.uint32], first: int) -> Sparse:
    occupied = np.flatnonzero(counts != 0)  # of truth values: an eighth of the time that numbers take
    return occupied.astype(np.int64) + first, counts[occupied].astype(np.int64)

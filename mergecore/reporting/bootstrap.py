"""A paired bootstrap over subsets of experts and items of tasks: the same resamples for every cell of a sweep."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergecore.errors import EvaluationError

Floats = NDArray[np.float64]

BLOCK_ELEMENTS = 2**22
"""Counts held at once (32 MiB): a task of ten thousand items must not need gigabytes."""
NEEDED_SHARE = 0.95
"""An interval is given only where at least this share of the resamples has a value."""


@dataclass(frozen=True)
class Draws:
    """The resamples of one report. Row 0 of everything it returns is the sample itself, rows 1… are resamples.

    What is drawn depends on the seed, the task's name and the number of items or subsets, on nothing else. So two
    cells, a cell and its denominator, or two counts of experts see the same items and the same positions of subsets,
    and a sweep that grows keeps the intervals it had.
    """

    resamples: int = 2000
    seed: int = 0

    def task_means(self, task: str, scores: Floats) -> Floats:
        """Mean over items, (1 + resamples) × cells, of `scores` (items × cells) of one task.

        Equal columns give equal results to the last bit: a matrix product alone does not promise that, and the
        difference of two equal models must be exactly zero.
        """
        items, cells = scores.shape
        first: dict[bytes, int] = {}
        columns = [np.ascontiguousarray(scores[:, cell]) for cell in range(cells)]
        place = [first.setdefault(column.tobytes(), cell) for cell, column in enumerate(columns)]
        distinct = sorted(set(place))
        unique = np.stack([columns[cell] for cell in distinct], axis=1)
        means = np.empty((1 + self.resamples, len(distinct)))
        means[0] = unique.sum(axis=0) / items
        generator = self._generator("items", task)
        step = max(1, BLOCK_ELEMENTS // items)
        for start in range(1, 1 + self.resamples, step):
            rows = min(step, 1 + self.resamples - start)
            means[start : start + rows] = _counts(generator, rows, items) @ unique / items
        return means[:, np.searchsorted(distinct, place)]

    def subset_weights(self, subsets: int) -> Floats:
        """Weights of each subset, (1 + resamples) × subsets; rows sum to 1. One subset always has weight 1."""
        weights = np.full((1 + self.resamples, subsets), 1.0 / subsets)
        if subsets > 1:
            weights[1:] = _counts(self._generator("subsets", str(subsets)), self.resamples, subsets) / subsets
        return weights

    def _generator(self, *purpose: str) -> np.random.Generator:
        words = np.frombuffer(hashlib.sha256("\0".join(purpose).encode()).digest(), dtype="<u4")
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, *words.tolist()])))


def _counts(generator: np.random.Generator, rows: int, size: int) -> Floats:
    """How often each of `size` things is drawn, rows × size: `size` draws with replacement in each row."""
    drawn = generator.integers(0, size, (rows, size))
    drawn += np.arange(rows)[:, None] * size
    return np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size).astype(np.float64)


def percentile_interval(samples: Floats, level: float = 0.95) -> tuple[Floats, Floats]:
    """Low and high end of the percentile interval over the rows 1… of `samples` ((1 + resamples) × anything).

    Resamples without a value (a denominator of zero) are left out; NaN where too few are left or row 0 has no value.
    """
    if not 0 < level < 1:
        raise EvaluationError(f"an interval of level {level} cannot be given; use a number between 0 and 1")
    ends = np.full((2, *samples.shape[1:]), np.nan)
    drawn = samples[1:].reshape(len(samples) - 1, samples[0].size)
    known = np.isfinite(drawn)
    flat = ends.reshape(2, -1)
    quantiles = [(1 - level) / 2, (1 + level) / 2]
    usable = np.isfinite(samples[0].ravel()) & (known.sum(axis=0) >= max(1.0, NEEDED_SHARE * len(drawn)))
    whole = usable & known.all(axis=0)
    if whole.any():
        flat[:, whole] = np.quantile(drawn[:, whole], quantiles, axis=0)
    for column in np.flatnonzero(usable & ~whole):
        flat[:, column] = np.quantile(drawn[known[:, column], column], quantiles)
    return ends[0], ends[1]

"""Radix selection: exact order statistics of many float32 values from two readings, without sorting (specs §0.3).

A value's pattern is an int32 that grows with it. The first reading counts the high half-words: it tells in which bin
the wanted rank lies. The second counts the low half-words inside that bin: it gives the value to its last bit, and how
many values lie above and at it.

Magnitudes are counted finer in the first reading: bin 2h has those whose pattern is exactly h·2^16, bin 2h + 1 those
between it and the next. Differences of bfloat16 numbers have few bits: the wanted one is nearly always of the first
kind, and then nothing is left to count.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergecore.plugins.statistic import SparseCounts


def bits(magnitude: Tensor) -> Tensor:
    """Return the pattern of non-negative float32 values: their bits as int32, 0 … 2^31−1."""
    return magnitude.view(torch.int32)


def signed_bits(values: Tensor) -> Tensor:
    """Return the pattern of any float32 values: negative ones have the bits below the sign inverted; −0 counts as 0."""
    pattern = bits(values + 0.0)
    return pattern ^ ((pattern >> 31) & 0x7FFFFFFF)


def value_of(pattern: int) -> float:
    """Return the float32 value that has this pattern, signed or of a magnitude."""
    float_bits = pattern if pattern >= 0 else pattern ^ 0x7FFFFFFF
    return float(struct.unpack("f", struct.pack("i", float_bits))[0])


def joined(left: SparseCounts | None, right: SparseCounts) -> SparseCounts:
    """Return the sum of two sparse counts."""
    if left is None:
        return right
    bins, positions = np.unique(np.concatenate([left[0], right[0]]), return_inverse=True)
    counts = np.zeros(len(bins), dtype=np.int64)
    np.add.at(counts, positions, np.concatenate([left[1], right[1]]))
    return bins, counts


def fine(magnitudes: Tensor) -> Tensor:
    """Return a pattern whose high half-word is the finer bin of a magnitude, less 2^15."""
    pattern = bits(magnitudes)
    between = torch.where((pattern & 0xFFFF) != 0, 1 << 16, 0).to(torch.int32)
    return (((pattern >> 16) - (1 << 14)) << 17) | between


def coarse(counts: SparseCounts) -> SparseCounts:
    """Return the counts of the high half-words, from those of the finer bins."""
    return joined((counts[0] >> 1, counts[1]), (counts[0][:0], counts[1][:0]))


def bin_of_rank(counts: Iterable[SparseCounts], rank: int) -> tuple[int, int, int]:
    """Return the bin of the rank-th largest element, how many elements lie in higher bins, and how many in it."""
    total: SparseCounts | None = None
    for part in counts:
        total = joined(total, part)
    assert total is not None
    bins, inside = total
    above: NDArray[np.int64] = inside[::-1].cumsum() - inside[::-1]
    position = int(np.searchsorted(above, rank, side="left")) - 1
    return int(bins[::-1][position]), int(above[position]), int(inside[::-1][position])


@dataclass
class OrderStatistic:
    """Finds the rank-th largest value, rank ≥ 1: `locate` after the first reading, `counted` in the second.

    It is found when everything inside the bin has been counted. low: counts of the low half-words inside the bin.
    above, equal: how many values are larger than the one found, and how many are equal to it.
    """

    rank: int
    bin: int = -1
    above: int = 0
    low: SparseCounts | None = None
    left: int = 0
    """How many values inside the bin are still to be counted."""
    value: int = -1
    """The pattern of the value; −1, which no value has, until it is found."""
    equal: int = 0

    def locate(self, counts: Iterable[SparseCounts]) -> None:
        """Find the bin from the counts of the high half-words."""
        self.bin, self.above, self.left = bin_of_rank(counts, self.rank)

    def locate_fine(self, counts: Sequence[SparseCounts]) -> None:
        """Find the value from counts of the finer bins, or the bin where it lies between two of those."""
        finer, above, inside = bin_of_rank(counts, self.rank)
        if finer & 1:
            self.locate(coarse(part) for part in counts)
        else:
            self.bin, self.above, self.value, self.equal = finer >> 1, above, finer >> 1 << 16, inside

    def counted(self, counts: SparseCounts) -> None:
        """Add counts of the low half-words inside the bin. Once the value is found there is nothing to add."""
        if self.left and len(counts[0]):
            self.low = joined(self.low, counts)
            self.left -= int(counts[1].sum())
            if self.left == 0:
                low, above, self.equal = bin_of_rank([self.low], self.rank - self.above)
                self.above += above
                self.value, self.low = (self.bin << 16) | low, None

    def join(self, other: OrderStatistic) -> None:
        """Add what another worker counted, from the same start."""
        if other.left == 0:
            self.low, self.left, self.above, self.value, self.equal = None, 0, other.above, other.value, other.equal
        elif other.low is not None:
            self.counted(other.low)

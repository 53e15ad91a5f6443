"""Radix selection: exact order statistics of many float32 values from two scans of counts, without sorting (specs §0.3).

A value's pattern is an int32 that grows with it. The first scan counts the high half-words, which tells in which bin
the wanted rank lies; the second counts the low half-words inside that bin, which gives the value to its last bit and
how many lie above and at it.

Of magnitudes the first scan counts finer: 2h are those whose pattern is exactly h·2^16, 2h + 1 those between it and the
next. Differences of bfloat16 numbers have few bits, so the wanted one is nearly always of the first kind, and then
there is nothing to count any more.
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
    """The pattern of non-negative float32 values: their bits as int32, 0 … 2^31−1."""
    return magnitude.view(torch.int32)


def signed_bits(values: Tensor) -> Tensor:
    """The pattern of any float32 values: for negative ones the bits below the sign are turned over; −0 counts as 0."""
    pattern = bits(values + 0.0)
    return pattern ^ ((pattern >> 31) & 0x7FFFFFFF)


def value_of(pattern: int) -> float:
    """The float32 value whose pattern (signed or of a magnitude) this is."""
    held = pattern if pattern >= 0 else pattern ^ 0x7FFFFFFF
    return float(struct.unpack("f", struct.pack("i", held))[0])


def joined(left: SparseCounts | None, right: SparseCounts) -> SparseCounts:
    """The sum of two sparse counts."""
    if left is None:
        return right
    bins, positions = np.unique(np.concatenate([left[0], right[0]]), return_inverse=True)
    counts = np.zeros(len(bins), dtype=np.int64)
    np.add.at(counts, positions, np.concatenate([left[1], right[1]]))
    return bins, counts


def fine(magnitudes: Tensor) -> Tensor:
    """A pattern whose high half-word is the finer bin of a magnitude, less 2^15."""
    pattern = bits(magnitudes)
    between = torch.where((pattern & 0xFFFF) != 0, 1 << 16, 0).to(torch.int32)
    return (((pattern >> 16) - (1 << 14)) << 17) | between


def coarse(counts: SparseCounts) -> SparseCounts:
    """Counts of the high half-words, from those of the finer bins."""
    return joined((counts[0] >> 1, counts[1]), (counts[0][:0], counts[1][:0]))


def bin_of_rank(counts: Iterable[SparseCounts], rank: int) -> tuple[int, int, int]:
    """The bin that holds the rank-th largest element, how many lie in higher bins, and how many in it."""
    total: SparseCounts | None = None
    for part in counts:
        total = joined(total, part)
    assert total is not None
    bins, held = total
    above: NDArray[np.int64] = held[::-1].cumsum() - held[::-1]
    position = int(np.searchsorted(above, rank, side="left")) - 1
    return int(bins[::-1][position]), int(above[position]), int(held[::-1][position])


@dataclass
class OrderStatistic:
    """The rank-th largest value (rank ≥ 1): `locate` after the first scan, `counted` in the second; it is found as soon as
    everything inside the bin has been counted.

    low: counts of the low half-words inside the bin. above, equal: how many values are larger, and how many are the one
    that was found.
    """

    rank: int
    bin: int = -1
    above: int = 0
    low: SparseCounts | None = None
    left: int = 0
    """How many values inside the bin are still to be counted."""
    value: int = -1
    """The pattern of the value found; −1, which no value has, before."""
    equal: int = 0

    def locate(self, counts: Iterable[SparseCounts]) -> None:
        """Find the bin from the counts of the high half-words."""
        self.bin, self.above, self.left = bin_of_rank(counts, self.rank)

    def locate_fine(self, counts: Sequence[SparseCounts]) -> None:
        """Find the value from counts of the finer bins, or the bin where it lies between two of those."""
        place, above, inside = bin_of_rank(counts, self.rank)
        if place & 1:
            self.locate(coarse(part) for part in counts)
        else:
            self.bin, self.above, self.value, self.equal = place >> 1, above, place >> 1 << 16, inside

    def counted(self, counts: SparseCounts) -> None:
        """Take in counts of the low half-words inside the bin; once the value is found there is nothing to take."""
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

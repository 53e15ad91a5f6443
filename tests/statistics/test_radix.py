"""Order statistics by radix selection against a full sort, to the last bit: signed values, ties, zeros, denormals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mergecore.engine.kernels.source import BINS
from mergecore.plugins.statistic import SparseCounts
from mergecore.statistics.radix import OrderStatistic, bits, signed_bits, value_of


def values(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    flat = torch.randn(20_011, generator=generator)
    if kind == "bfloat16":  # many exact ties
        flat = flat.to(torch.bfloat16).to(torch.float32)
    elif kind == "sparse":
        flat = torch.where(torch.rand(20_011, generator=generator) < 0.6, 0.0, flat)
    elif kind == "zeros":
        flat = torch.where(torch.rand(20_011, generator=generator) < 0.5, 0.0, -0.0)
    elif kind == "denormal":
        flat = flat * 1e-41
    elif kind == "wide":
        flat = flat * torch.exp2(torch.randint(-120, 120, (20_011,), generator=generator).float())
    return flat


def test_patterns_grow_with_the_values() -> None:
    values = torch.tensor([-3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3e38])
    pattern = signed_bits(values)
    assert pattern[3] == pattern[4] == 0
    assert (pattern[[0, 1, 2, 4, 5, 6, 7]].diff() > 0).all()
    assert [value_of(int(p)) for p in pattern] == [float(v) for v in values]
    assert torch.equal(bits(values[4:]), pattern[4:])


def sparse(numbers: Tensor) -> SparseCounts:
    bins, counts = np.unique(numbers.numpy(), return_counts=True)
    return bins.astype(np.int64), counts.astype(np.int64)


@pytest.mark.parametrize("kind", ["normal", "bfloat16", "sparse", "zeros", "denormal", "wide"])
@pytest.mark.parametrize("workers", [1, 3])
def test_equals_a_full_sort(kind: str, workers: int) -> None:
    flat = values(kind)
    ordered = flat.sort(descending=True).values
    parts = [signed_bits(part) for part in flat.chunk(workers)]
    high = [sparse(part >> 16) for part in parts]
    for rank in (1, 2, 100, 10_000, 15_000, 20_010, 20_011):
        states = [OrderStatistic(rank) for _ in parts]
        for state, part in zip(states, parts, strict=True):
            state.locate(high)
            inside = part[(part >> 16) == state.bin] & (BINS - 1)
            state.counted(sparse(inside))
        for state in states[1:]:
            states[0].join(state)
        expected = ordered[rank - 1]
        assert value_of(states[0].value) == float(expected)
        assert states[0].above == int((flat > expected).sum())
        assert states[0].equal == int((flat == expected).sum())

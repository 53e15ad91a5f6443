"""Choosing without a sort, against a stable sort."""

from __future__ import annotations

import pytest
import torch

from mergecore.arithmetic.order_statistics import ascending, largest, order_statistics


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_are_those_of_a_stable_sort(rows: int, ties: bool, dtype: torch.dtype) -> None:
    values = torch.randn(rows, 97, generator=torch.Generator().manual_seed(4), dtype=dtype).abs()
    values = (values * 3).round() if ties else values
    order = values.sort(dim=1, descending=True, stable=True).indices
    for count in (-1, 0, 1, 2, 30, 96, 97, 98):
        wanted = torch.zeros_like(values, dtype=torch.bool).scatter_(1, order[:, : max(count, 0)], True)
        assert torch.equal(largest(values, count), wanted), count


def test_order_statistics_are_those_of_a_sort() -> None:
    values = torch.randn(1001, generator=torch.Generator().manual_seed(4)).round(decimals=1)
    ordered = values.sort().values
    assert order_statistics(values, [0, 250, 500, 1000]) == [float(ordered[rank]) for rank in (0, 250, 500, 1000)]


@pytest.mark.parametrize("ties", [False, True])
def test_the_order_is_that_of_a_stable_sort(ties: bool) -> None:
    values = torch.randn(7, 301, generator=torch.Generator().manual_seed(4)) * 1e-3
    values = values.bfloat16().float() * (values.abs() > 3e-4) if ties else values
    values[0, :5] = torch.tensor([0.0, -0.0, 1e-45, 3e38, 0.0])
    assert torch.equal(ascending(values.abs()), values.abs().sort(dim=1, stable=True).indices)

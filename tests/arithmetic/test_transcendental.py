"""exp and tanh from + − × ÷: how far from the true values, and the same bits for any cut."""

from __future__ import annotations

import pytest
import torch

from mergecore.arithmetic.transcendental import exponential, small_tanh, tanh

GENERATOR = torch.Generator().manual_seed(0)


def spread(scale: float, count: int = 50_000) -> torch.Tensor:
    return (torch.rand(count, generator=GENERATOR) * 2 - 1) * scale


def worst(actual: torch.Tensor, expected: torch.Tensor) -> float:
    error = (actual.double() - expected).abs() / expected.abs().clamp(min=1e-300)
    return float(error[expected != 0].max())


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e-3, 0.1, 1.0, 8.0, 87.0])
def test_accuracy(scale: float) -> None:
    values = spread(scale)
    assert worst(exponential(values), values.double().exp()) < 2**-21
    assert worst(tanh(values), values.double().tanh()) < 2**-20
    if scale <= 1:
        assert worst(small_tanh(values), values.double().tanh()) < 2**-21


def test_ends() -> None:
    values = torch.tensor([0.0, -1e4, 1e4, -87.0, 88.0])
    assert exponential(values)[0] == 1.0
    assert torch.isfinite(exponential(values)).all() and (exponential(values) > 0).all()
    assert torch.equal(tanh(values[:3]), torch.tensor([0.0, -1.0, 1.0]))
    assert torch.equal(values, torch.tensor([0.0, -1e4, 1e4, -87.0, 88.0]))  # nothing is written to its argument
    assert exponential(torch.empty(0)).shape == tanh(torch.empty(0)).shape == (0,)


def test_the_cut_does_not_matter() -> None:
    values = spread(3.0, 1_003)
    for function in (exponential, small_tanh, tanh):
        assert torch.equal(function(values), torch.cat([function(part) for part in values.split(7)]))


def test_tanh_is_odd() -> None:
    values = spread(2.0)
    assert torch.equal(tanh(-values), -tanh(values))
    assert torch.equal(small_tanh(-values), -small_tanh(values))

"""Model Breadcrumbs: the worked row, exact counts, both scopes, and tensors so small that a share is no element."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergecore import merge, methods

ROW = torch.tensor([0.1, -0.4, 0.3, 0.2, 0.05])


@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_worked_row(scope: str) -> None:
    method = methods.Breadcrumbs.model_validate({"scale": 0.5, "density": 0.4, "outliers": 0.2, "scope": scope})
    actual = merge(method, base={"w": torch.ones(5)}, experts=[{"w": 1 + ROW}, {"w": 1 + ROW}])["w"]
    torch.testing.assert_close(actual, 1 + torch.tensor([0, 0, 0.3, 0.2, 0]))


def masked(delta: Tensor, **values: object) -> Tensor:
    return methods.Breadcrumbs.model_validate({"scale": 1.0, **values}).masked(delta)


def test_rows_are_the_last_axis() -> None:
    rows = torch.stack([ROW, ROW.flip(0)])
    actual = masked(rows, density=0.4, outliers=0.2, scope="row")
    expected = torch.tensor([0, 0, 0.3, 0.2, 0])
    assert torch.equal(actual, torch.stack([expected, expected.flip(0)]))
    delta = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    actual = masked(delta, density=0.4, outliers=0.2, scope="row")
    single = [masked(row, density=0.4, outliers=0.2) for row in delta.view(-1, 5)]
    assert torch.equal(actual.view(-1, 5), torch.stack(single))


@pytest.mark.parametrize("density", [0.0, 0.1, 0.29, 0.5])
@pytest.mark.parametrize("outliers", [0.0, 0.01, 0.29, 0.5])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_exact_counts(density: float, outliers: float, bfloat16: bool) -> None:
    """The authors' two steps on a full sort; of equal magnitudes the first ranks higher, so that counts stay exact."""
    delta = torch.randn(10, 10, generator=torch.Generator().manual_seed(1))
    delta = delta.to(torch.bfloat16).to(torch.float32) if bfloat16 else delta
    order = torch.argsort(delta.abs().reshape(-1), descending=True, stable=True)
    removed, kept = round(outliers * 100), round(density * 100)
    expected = torch.zeros(100)
    chosen = order[removed : removed + kept]
    expected[chosen] = delta.reshape(-1)[chosen]
    assert torch.equal(masked(delta, density=density, outliers=outliers), expected.view(10, 10))


def test_no_outlier_in_a_small_tensor() -> None:
    """⌊0.01 · 50⌋ = 0: nothing is too large, and the tensor is not emptied."""
    delta = torch.randn(50, generator=torch.Generator().manual_seed(2))
    actual = masked(delta, density=0.5, outliers=0.01)
    assert int((actual != 0).sum()) == 25
    assert torch.equal(actual != 0, delta.abs() >= delta.abs().sort().values[25])


@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_odd_shapes(scope: str) -> None:
    for shape in ((), (0,), (0, 3), (1,), (3, 1), (1, 3)):
        delta = torch.full(shape, 0.5)
        actual = masked(delta, scope=scope)
        assert actual.shape == delta.shape
    assert masked(torch.tensor(0.5), scope=scope) == 0.5
    assert torch.equal(masked(torch.zeros(4, 4), scope=scope), torch.zeros(4, 4))
    assert torch.equal(
        masked(torch.full((10,), -0.5), density=0.2, outliers=0.1, scope=scope),
        torch.tensor([0, -0.5, -0.5, 0, 0, 0, 0, 0, 0, 0]),
    )


def test_without_tails_it_is_task_arithmetic() -> None:
    torch.manual_seed(3)
    base = {"w": torch.randn(7, 5)}
    experts = [{"w": torch.randn(7, 5)} for _ in range(3)]
    actual = merge(methods.Breadcrumbs(scale=0.3, density=1, outliers=0), base=base, experts=experts)
    expected = merge(methods.TaskArithmetic(scale=0.3), base=base, experts=experts)
    assert torch.equal(actual["w"], expected["w"])


def test_shares_that_overlap_are_refused() -> None:
    methods.Breadcrumbs(scale=1, density=0.7, outliers=0.3)
    with pytest.raises(ValueError, match="more than 1"):
        methods.Breadcrumbs(scale=1, density=0.8, outliers=0.3)

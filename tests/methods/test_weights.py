"""Weights and shares per expert: worked numbers, and that they move with their experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mergecore import merge, methods
from mergecore.arithmetic.trims import RandomDrop
from mergecore.errors import SpecError
from mergecore.plugins.method import Method

FIRST, SECOND = (4.0, -1.0, 2.0, 0.5), (-3.0, 2.0, 1.0, 0.0)


def actual(method: Method, **more: Any) -> list[float]:
    """The merge of two experts on a base of zeros, one tensor of four."""
    experts = [{"w": torch.tensor(values)} for values in (FIRST, SECOND)]
    result: Tensor = merge(method, base={"w": torch.zeros(4)}, experts=experts, **more)["w"]
    return result.tolist()


TENSOR: dict[str, Any] = {"scope": "tensor", "count": "exact", "zero_sign": "positive"}
WORKED: dict[str, tuple[Method, list[float]]] = {
    "a sum": (methods.Average(weights=(0.5, -1.0), aggregate="sum"), [5.0, -2.5, 0.0, 0.25]),
    "a mean with a negative weight": (methods.Average(weights=(2.0, -1.0)), [11.0, -4.0, 3.0, 1.0]),
    "changes": (methods.TaskArithmetic(weights=(1.0, 0.5), scale=2.0), [5.0, 0.0, 5.0, 1.0]),
    "changes, divided": (
        methods.TaskArithmetic(weights=(1.0, 0.5), scale=2.0, aggregate="mean"), [10 / 3, 0.0, 10 / 3, 2 / 3],
    ),
    "changes whose weights cancel": (
        methods.TaskArithmetic(weights=(1.0, -1.0), scale=1.0, aggregate="mean"), [3.5, -1.5, 0.5, 0.25],
    ),
    "changes whose weights cancel, as mergekit": (
        methods.TaskArithmetic(weights=(1.0, -1.0), scale=1.0, aggregate="signed_mean"), [7.0, -3.0, 1.0, 0.5],
    ),
    "a change to forget": (
        methods.TaskArithmetic(weights=(-2.0, 0.0), scale=1.0, aggregate="mean"), [-4.0, 1.0, -2.0, -0.5],
    ),
    # trimmed (4, 0, 2, 0) and (−3, 2, 1, 0); weighted, sums are (2.5, 1, 2.5, 0): all positive
    "ties": (methods.Ties(density=(0.5, 0.75), weights=(1.0, 0.5), **TENSOR), [4.0, 2.0, 5 / 3, 0.0]),
    "ties, summed": (
        methods.Ties(density=(0.5, 0.75), weights=(1.0, 0.5), aggregate="sum", **TENSOR), [4.0, 1.0, 2.5, 0.0],
    ),
    # weighted (4, −1, 2, .5) and (3, −2, −1, 0): signs + − + +; the weights of the first two coordinates cancel
    "ties, a negative weight": (methods.Ties(density=1, weights=(1.0, -1.0), **TENSOR), [3.5, -1.5, 2.0, 0.5]),
    "ties, a negative weight, as mergekit": (
        methods.Ties(density=1, weights=(1.0, -1.0), aggregate="signed_mean", **TENSOR), [7.0, -3.0, 2.0, 0.5],
    ),
    # of one expert alone the mean is what it changes, turned round
    "ties, forgetting": (
        methods.Ties(density=1, weights=(-0.1, 0.0), **TENSOR), [-4.0, 1.0, -2.0, -0.5],
    ),
    "breadcrumbs, forgetting": (
        methods.Breadcrumbs(scale=1, density=1, outliers=0.0, weights=(-0.5, 0.0), elect="mass", aggregate="mean"),
        [-4.0, 1.0, -2.0, -0.5],
    ),
    "della, forgetting": (
        methods.Della(density=1, window=0, weights=(0.0, -3.0), rescale="none"), [3.0, -2.0, -1.0, 0.0],
    ),
    "della, forgetting, as mergekit": (
        methods.Della(density=1, window=0, weights=(0.0, -3.0), rescale="none", aggregate="signed_mean"),
        [-3.0, 2.0, 1.0, 0.0],
    ),
    "ties, one element at least": (methods.Ties(density=0.1, least=1, aggregate="sum", **TENSOR), [4.0, 0.0, 0.0, 0.0]),
    "breadcrumbs": (  # of the first the largest goes and two stay; of the second the two largest stay
        methods.Breadcrumbs(scale=1, density=0.5, outliers=(0.25, 0.0), weights=(1.0, 2.0)), [-6.0, 3.0, 2.0, 0.0],
    ),
    "breadcrumbs, elected": (
        methods.Breadcrumbs(scale=1, density=0.5, outliers=(0.25, 0.0), weights=(1.0, 2.0), elect="mass",
                            aggregate="mean"), [-3.0, 2.0, 2.0, 0.0],
    ),
    "breadcrumbs, crowded": (  # three of four stay, so one outlier goes at most
        methods.Breadcrumbs(scale=1, density=0.75, outliers=0.5, crowded="fewer", weights=(1.0, 0.0)),
        [0.0, -1.0, 2.0, 0.5],
    ),
    "breadcrumbs, rescaled": (  # 7.5 / 3 of what is left of the first
        methods.Breadcrumbs(scale=1, density=0.5, outliers=0.25, rescale="l1", weights=(1.0, 0.0)),
        [0.0, -2.5, 5.0, 0.0],
    ),
    "della without a drop": (
        methods.Della(density=1, window=0, weights=(1.0, 0.5), elect="none", aggregate="mean", rescale="none"),
        [5 / 3, 0.0, 5 / 3, 1 / 3],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WORKED)
def test_worked_numbers(case: str) -> None:
    method, wanted = WORKED[case]
    ids = ["x", "y"] if method.needs_ids else None
    assert actual(method, ids=ids) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("case", WORKED)
def test_values_move_with_their_experts(case: str) -> None:
    """Folded by ascending id, here in the other order: each expert keeps its own weight and share."""
    method, wanted = WORKED[case]
    assert actual(method, ids=["y", "x"]) == pytest.approx(wanted, abs=1e-6)


def test_rates_of_their_own() -> None:
    """Each expert is dropped at its own rate; what is left counts as it is, or by its own 1/(1 − rate)."""
    count = 40_000
    experts = [{"w": torch.ones(count)}, {"w": torch.full((count,), 10.0)}]
    for rescale, factors in (("none", (1.0, 1.0)), ("inverse", (1 / 0.9, 2.0))):
        drop = RandomDrop(rate=(0.1, 0.5), rescale=rescale)  # type: ignore[arg-type]
        merged = merge(
            methods.TaskArithmetic(scale=1, drop=drop), base={"w": torch.zeros(count)}, experts=experts, ids=["b", "a"]
        )["w"]
        second = merged >= 10
        first = (merged - torch.where(second, 10 * factors[1], 0.0)).abs() > 0.5
        torch.testing.assert_close(merged, first * factors[0] + second * 10 * factors[1], rtol=0, atol=1e-5)
        assert abs(float(first.float().mean()) - 0.9) < 0.01 and abs(float(second.float().mean()) - 0.5) < 0.015


@pytest.mark.parametrize(
    "method",
    [
        methods.Ties(density=(0.5, 0.5, 0.5)),
        methods.Ties(weights=(1.0,)),
        methods.TaskArithmetic(scale=1, weights=(1.0,)),
        methods.TaskArithmetic(scale=1, drop=RandomDrop(rate=(0.1,))),
        methods.Breadcrumbs(scale=1, outliers=(0.1,)),
        methods.Della(window=(0.1, 0.1, 0.1)),
    ],
)
def test_one_value_per_expert_or_one_for_all(method: Method) -> None:
    with pytest.raises(SpecError, match=r"given for 2 experts; give one per expert"):
        actual(method, ids=["x", "y"])

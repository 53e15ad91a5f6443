"""The worked numbers of the methods' definitions: each value here was computed by an independent formula, not by us."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergecore import merge, methods
from mergecore.statistics.threshold import Threshold

BASE = {"w": torch.tensor([1.0, 2.0, -1.0])}
FIRST = {"w": torch.tensor([1.5, 2.0, -2.0])}
SECOND = {"w": torch.tensor([0.5, 3.0, -1.5])}


def close(actual: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_task_arithmetic() -> None:
    def merged_with(scale: float) -> torch.Tensor:
        return merge(methods.TaskArithmetic(scale=scale), base=BASE, experts=[FIRST, SECOND])["w"]

    close(merged_with(0.4), [1, 2.4, -1.6])
    close(merged_with(0.5), [1, 2.5, -1.75])
    assert torch.equal(merged_with(0.0), BASE["w"])
    close(merge(methods.TaskArithmetic(scale=-0.5), base=BASE, experts=[FIRST])["w"], [0.75, 2, -0.5])


def test_average_needs_no_base() -> None:
    close(merge(methods.Average(), experts=[FIRST, SECOND])["w"], [1, 2.5, -1.75])
    close(merge(methods.Average(weights=(3, 1)), experts=[FIRST, SECOND])["w"], [1.25, 2.25, -1.875])


TASK_VECTORS = torch.tensor(
    [
        [0.5, -0.1, 0.02, 0.3, -0.4, 0.0, 0.01, -0.03, 0.2, -0.05],
        [0.4, 0.2, -0.03, -0.3, 0.1, 0.0, -0.02, 0.05, -0.6, 0.04],
        [-0.6, 0.15, 0.01, 0.0, 0.35, 0.0, 0.03, -0.01, 0.1, 0.02],
    ]
)


def merged_by_ties(vectors: torch.Tensor, split: int = 0, **values: object) -> torch.Tensor:
    """TIES on rows of task vectors; `split` cuts the flat vector into two tensors, which a global ranking must not see."""

    def model(row: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"a": row[:split], "b": row[split:]} if split else {"a": row}

    base = model(torch.zeros(vectors.shape[1]))
    actual = merge(methods.Ties.model_validate(values), base=base, experts=[model(row) for row in vectors])
    return torch.cat([actual[name] for name in sorted(actual)])


@pytest.mark.parametrize("split", [0, 1, 4, 9])
def test_ties_exact_top_share(split: int) -> None:
    actual = merged_by_ties(TASK_VECTORS, split, density=0.2)
    close(actual, [0.45, 0, 0, 0, -0.4, 0, 0, 0, -0.6, 0])


@pytest.mark.parametrize("split", [0, 3, 7])
def test_ties_as_published(split: int) -> None:
    actual = merged_by_ties(TASK_VECTORS, split, density=0.2, count="published")
    close(actual, [0.45, 0.15, 0, -0.3, -0.4, 0, 0, 0, -0.6, 0])


def test_ties_elects_by_mass_or_by_shares_of_the_norm() -> None:
    """‖τ‖² are 14 and 10, then 2, 2 and 1.8: in the last column of the first the shares are 4/14 and 4/10; in the first of the
    second 1/2 + 1/2 stand against 0.8."""
    rows = torch.tensor([[3.0, -1.0, 0.0, 2.0], [-1.0, 2.0, 1.0, -2.0]])
    close(merged_by_ties(rows, density=1.0), [3.0, 2, 1, 0])
    close(merged_by_ties(rows, density=1.0, elect="normmass"), [3.0, 2, 1, -2])
    close(merged_by_ties(rows, 1, density=1.0, elect="normfrac"), [3.0, 2, 1, -2])
    rows = torch.tensor([[1.0, 1.0], [1.0, 1.0], [-1.2, 0.6]])
    close(merged_by_ties(rows, density=1.0, elect="normmass"), [1.0, 2.6 / 3])
    close(merged_by_ties(rows, density=1.0, elect="normfrac"), [-1.2, 2.6 / 3])


@pytest.mark.parametrize("elect", ["mass", "normmass", "normfrac"])
@pytest.mark.parametrize("weights", [None, [0.5, -2.0, 3.0]])
def test_ties_elections_against_their_formulas(elect: str, weights: list[float] | None) -> None:
    """On values of few digits, so that many cancel: numpy in float64, trimmed by a sort, zeros drop out."""
    rows = torch.randn(3, 400, generator=torch.Generator().manual_seed(6)).round(decimals=1)
    kept = rows.double().numpy()
    least = np.sort(np.abs(kept), axis=1)[:, ::-1][:, 199:200]
    kept = np.where(np.abs(kept) >= least, kept, 0.0) * (1.0 if weights is None else np.array(weights)[:, None])
    parts = kept**2 / (kept**2).sum(1, keepdims=True)
    sign = np.sign(kept.sum(0).round(9))
    if elect == "normmass":
        sign = np.sign((np.sign(kept) * parts).sum(0).round(12))
    elif elect == "normfrac":
        sign = np.sign(kept[parts.argmax(0), np.arange(400)])
    agreed = np.where(kept * sign > 0, kept, 0.0)
    by = np.where(agreed != 0, 1.0 if weights is None else np.abs(weights)[:, None], 0.0).sum(0)
    expected = agreed.sum(0) / np.where(by == 0, 1.0, by)
    actual = merged_by_ties(rows, 150, density=0.5, elect=elect, weights=weights)
    far = np.abs(actual.numpy() - expected) > 1e-4
    assert not far.any(), (np.flatnonzero(far), actual[far.nonzero()], expected[far])


def test_ties_majority_decides_exact_cancellation() -> None:
    rows = torch.tensor([[0.3, 1.0, -0.2, -0.1], [-0.3, 0.5, -0.4, 0.0]])
    close(merged_by_ties(rows, density=1.0, zero_sign="majority"), [-0.3, 0.75, -0.3, -0.1])
    close(merged_by_ties(rows, density=1.0), [0, 0.75, -0.3, -0.1])
    close(merged_by_ties(rows, density=1.0, zero_sign="positive"), [0.3, 0.75, -0.3, -0.1])
    close(merged_by_ties(rows, density=1.0, aggregate="sum"), [0, 1.5, -0.6, -0.1])
    close(merged_by_ties(rows, density=1.0, aggregate="max"), [0, 1.0, -0.4, -0.1])


def test_ties_at_the_threshold() -> None:
    """Five equal magnitudes, three wanted: 'at_least' keeps all five, 'exact' the first three by name and index."""
    row = torch.tensor([[0.5, -0.5, 0.1, 0.5, -0.5, 0.5, 0.0, 0.2, 0.1, 0.1]])
    for split in (0, 1, 4):
        close(merged_by_ties(row, split, density=0.3), [0.5, -0.5, 0, 0.5, -0.5, 0.5, 0, 0, 0, 0])
        close(merged_by_ties(row, split, density=0.3, count="exact"), [0.5, -0.5, 0, 0.5, 0, 0, 0, 0, 0, 0])


def test_ties_keeps_nothing_and_everything() -> None:
    close(merged_by_ties(TASK_VECTORS[:1], density=0.0), [0.0] * 10)
    close(merged_by_ties(TASK_VECTORS[:1], density=1.0), TASK_VECTORS[0].tolist())


def test_rank_is_the_decimal_not_the_binary_product() -> None:
    assert Threshold(density=0.29).rank(100) == 29
    assert Threshold(density=0.2).rank(10) == 2
    assert Threshold(density=0.2, count="published").rank(10) == 3
    assert Threshold(density=1.0, count="published").rank(10) == 10


def fisher_merge(**values: object) -> torch.Tensor:
    experts = [{"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}, {"w": torch.tensor([3.0, -2.0, 5.0, 0.0])}]
    fishers = [{"w": torch.tensor([4.0, 1.0, 0.0, 0.0])}, {"w": torch.tensor([1.0, 1.0, 2e-7, 0.0])}]
    return merge(methods.Fisher.model_validate(values), experts=experts, statistics={"fisher": fishers})["w"]


def test_fisher() -> None:
    close(fisher_merge(floor=1e-6), [1.843174, -0.978413, 4.489206, 1.021587])
    # Without a floor the only informed expert wins, and where nobody is informed the plain mean stands.
    close(fisher_merge(), [1.843174, -0.978413, 5.0, 2.0])
    close(fisher_merge(normalize=False), [1.4, 0, 5.0, 2.0])
    close(fisher_merge(weights=(0, 1)), [3.0, -2.0, 5.0, 0.0])


def test_fisher_norm_takes_a_factor_out() -> None:
    experts = [{"w": torch.randn(50)}, {"w": torch.randn(50)}]
    fishers = [torch.rand(50), torch.rand(50)]

    def merged_with(factor: float) -> torch.Tensor:
        handed = [{"w": fishers[0] * factor}, {"w": fishers[1]}]
        return merge(methods.Fisher(), experts=experts, statistics={"fisher": handed})["w"]

    torch.testing.assert_close(merged_with(1.0), merged_with(1000.0))


@pytest.mark.parametrize(("rescale", "expected"), [("inverse", [0.004, 0, 0, 0.006]), ("l1", [0.0026, 0, 0, 0.0039])])
def test_dare_rescales(rescale: str, expected: list[float]) -> None:
    """With the first and the last element kept: a seed that draws this mask is looked for."""
    delta = torch.tensor([0.002, -0.001, 0.0005, 0.003])
    for seed in range(1000):
        drop = methods.RandomDrop.model_validate({"rate": 0.5, "rescale": rescale, "seed": seed})
        method = methods.TaskArithmetic(scale=1.0, drop=drop)
        actual = merge(method, base={"w": torch.zeros(4)}, experts=[{"w": delta}], ids=["expert"])["w"]
        if (actual != 0).tolist() == [True, False, False, True]:
            close(actual, expected)
            return
    raise AssertionError("no seed below 1000 draws the mask")


@pytest.mark.parametrize("rescale", ["inverse", "l1"])
def test_dare_expectation_and_density(rescale: str) -> None:
    torch.manual_seed(0)
    count, seeds, rate = 4000, 60, 0.7
    delta = torch.randn(count)
    total = torch.zeros(count)
    for seed in range(seeds):
        drop = methods.RandomDrop.model_validate({"rate": rate, "seed": seed, "rescale": rescale})
        method = methods.TaskArithmetic(scale=1.0, drop=drop)
        actual = merge(method, base={"w": torch.zeros(count)}, experts=[{"w": delta}], ids=["expert"])["w"]
        kept = int((actual != 0).sum())
        assert abs(kept - count * (1 - rate)) < 5 * (count * rate * (1 - rate)) ** 0.5
        if rescale == "l1":
            assert float(actual.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-4)
        total += actual
    error = (total / seeds - delta).abs()
    sigma = delta.abs() * (rate / (1 - rate) / seeds) ** 0.5
    assert float((error <= 4 * sigma + 0.05 * delta.abs()).float().mean()) > 0.999


def test_fisher_of_the_smallest_numbers_there_are() -> None:
    """Squared gradients reach below the normal float32 numbers; a mean stays between the experts all the same."""
    experts = [{"w": torch.tensor([0.6, 0.6, 2.0])}, {"w": torch.tensor([0.7, 0.3, 4.0])}]
    fishers = [{"w": torch.tensor([1e-45, 1e-44, 1e-40])}, {"w": torch.tensor([1e-45, 1e-44, 2e-40])}]
    method = methods.Fisher(normalize=False)
    actual = merge(method, experts=experts, statistics={"fisher": fishers})
    torch.testing.assert_close(actual["w"], torch.tensor([0.65, 0.45, 10 / 3]), rtol=1e-4, atol=0)

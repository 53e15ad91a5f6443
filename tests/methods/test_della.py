"""DELLA: the worked probabilities, expectation and density over many seeds, and what it equals at its ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mergecore import merge, methods
from mergecore.identity.draws import random_key


def della(**values: Any) -> methods.Della:
    return methods.Della.model_validate(values)


def test_worked_probabilities() -> None:
    magnitude = torch.tensor([0.1, 0.4, 0.3, 0.2])
    rank = magnitude.argsort().argsort()
    actual = della(density=0.5, window=0.2).probabilities(4)[rank]
    expected = torch.tensor([0.4, 0.6, 0.5 + 1 / 30, 0.5 - 1 / 30], dtype=torch.float64)
    torch.testing.assert_close(actual, expected)
    assert della(density=0.93, window=0.14).probabilities(9).max() <= 1
    assert della(density=0.6).probabilities(1).tolist() == [0.6]


def test_kept_as_often_as_the_rank_says_and_unbiased() -> None:
    rows, length, seeds = 40, 25, 100
    delta = torch.randn(rows, length, generator=torch.Generator().manual_seed(0)) + 0.01
    kept, total = torch.zeros(rows, length), torch.zeros(rows, length)
    for seed in range(seeds):
        actual = della(density=0.5, window=0.6, seed=seed).pruned(delta, random_key(seed, "expert", "tensor"))
        kept += actual != 0
        total += actual
    rank = delta.abs().argsort(1).argsort(1)
    probability = della(density=0.5, window=0.6).probabilities(length)
    for place in range(length):
        share, expected = float(kept[rank == place].mean()) / seeds, float(probability[place])
        assert abs(share - expected) < 4.5 * (expected * (1 - expected) / (rows * seeds)) ** 0.5
    p = probability[rank]
    sigma = delta.abs() * ((1 - p) / p / seeds) ** 0.5
    assert float(((total / seeds - delta).abs() <= 4 * sigma).float().mean()) > 0.998


def test_masks_of_experts_tensors_and_seeds_are_independent() -> None:
    delta = torch.ones(100, 100)
    first = della(density=0.5).pruned(delta, random_key(0, "a", "t")) != 0
    for other in (("b", "t", 0), ("a", "u", 0), ("a", "t", 1)):
        second = della(density=0.5, seed=other[2]).pruned(delta, random_key(other[2], *other[:2])) != 0
        agree = float((first == second).float().mean())
        assert abs(agree - 0.5) < 0.03


def test_each_is_rescaled_by_its_own_probability() -> None:
    delta = torch.tensor([[0.1, -0.4, 0.3, 0.2]])
    p = torch.tensor([[0.4, 0.6, 0.5 + 1 / 30, 0.5 - 1 / 30]])
    for seed in range(8):
        actual = della(density=0.5, window=0.2, seed=seed).pruned(delta, random_key(seed, "e", "t"))
        kept = actual != 0
        torch.testing.assert_close(actual[kept], (delta / p)[kept])
        plain = della(density=0.5, window=0.2, seed=seed, rescale="none").pruned(delta, random_key(seed, "e", "t"))
        assert torch.equal(plain, torch.where(kept, delta, 0.0))


def test_l1_norm_is_kept_as_in_mergekit() -> None:
    delta = torch.randn(30, 17, generator=torch.Generator().manual_seed(3))
    actual = della(rescale="l1").pruned(delta, random_key(0, "e", "t"))
    kept = actual != 0
    factor = delta.abs().sum() / delta[kept].abs().sum()
    torch.testing.assert_close(actual[kept], delta[kept] * factor)


def test_without_a_window_it_is_dare() -> None:
    """The same hash drops the same elements; at ½ the two rescalings are the same bits."""
    torch.manual_seed(1)
    base = {"w": torch.randn(20, 30)}
    experts = [{"w": base["w"] + torch.randn(20, 30) * 0.1} for _ in range(3)]
    drop = methods.RandomDrop(rate=0.5, seed=4)

    def merged_by(method: methods.Method) -> Tensor:
        return merge(method, base=base, experts=experts, ids=["x", "y", "z"])["w"]

    dare_ties = methods.Ties(density=1, drop=drop, zero_sign="positive", scale=0.9)
    assert torch.equal(merged_by(della(density=0.5, window=0, seed=4, scale=0.9)), merged_by(dare_ties))
    linear = della(density=0.5, window=0, seed=4, elect="none", aggregate="sum", scale=0.9)
    assert torch.equal(merged_by(linear), merged_by(methods.TaskArithmetic(scale=0.9, drop=drop)))


def test_nothing_dropped_leaves_election_and_mean() -> None:
    rows = torch.tensor([[0.5, -0.2, 0.3, 0.0], [0.1, 0.4, -0.3, 0.0], [0.3, -0.1, 0.1, -0.2]])

    def merged_by(**values: Any) -> Tensor:
        method = della(density=1, window=0, **values)
        actual = merge(method, base={"w": torch.zeros(4)}, experts=[{"w": row} for row in rows], ids=["a", "b", "c"])
        return actual["w"]

    torch.testing.assert_close(merged_by(), torch.tensor([0.3, 0.4, 0.2, -0.2]))
    torch.testing.assert_close(merged_by(aggregate="sum"), torch.tensor([0.9, 0.4, 0.4, -0.2]))
    torch.testing.assert_close(merged_by(elect="none"), rows.mean(0))
    torch.testing.assert_close(merged_by(elect="none", aggregate="sum"), rows.sum(0))


def test_rows_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large row changes no other; pieces of rows are worked on one after another without a trace."""
    delta = torch.randn(12, 2, 5, generator=torch.Generator().manual_seed(5))
    first = della().pruned(delta, random_key(0, "e", "t"))
    larger = delta.clone()
    larger[3] *= 100
    second = della().pruned(larger, random_key(0, "e", "t"))
    assert torch.equal(first[:3], second[:3]) and torch.equal(first[4:], second[4:])
    monkeypatch.setattr("mergecore.methods.della.BLOCK", 25)
    assert torch.equal(first, della().pruned(delta, random_key(0, "e", "t")))


def test_equal_magnitudes_are_ranked_by_place() -> None:
    low = high = 0
    for seed in range(200):
        kept = (
            della(density=0.5, window=0.8, seed=seed).pruned(torch.full((1, 11), -0.5), random_key(seed, "e", "t")) != 0
        )
        low, high = low + int(kept[0, 0]), high + int(kept[0, 10])
    assert low < 40 and high > 160


@pytest.mark.parametrize("rescale", ["inverse", "l1", "none"])
def test_odd_shapes_and_zeros(rescale: str) -> None:
    for shape in ((), (0,), (0, 3), (1,), (3, 1), (2, 3, 2, 2)):
        actual = della(rescale=rescale).pruned(torch.full(shape, 0.5), random_key(0, "e", "t"))
        assert actual.shape == shape and torch.isfinite(actual).all()
    assert not della(rescale=rescale).pruned(torch.zeros(4, 4), random_key(0, "e", "t")).any()
    actual = merge(
        della(rescale=rescale),
        base={"w": torch.ones(5, 4, dtype=torch.bfloat16)},
        experts=[{"w": torch.full((5, 4), 1.5, dtype=torch.bfloat16)}],
        ids=["e"],
    )
    assert actual["w"].dtype == torch.bfloat16


def test_probabilities_must_be_probabilities() -> None:
    della(density=0.93, window=0.14)
    for density, window in ((0.95, 0.14), (0.07, 0.14), (1.0, 0.1)):
        with pytest.raises(ValueError, match="probabilities"):
            della(density=density, window=window)

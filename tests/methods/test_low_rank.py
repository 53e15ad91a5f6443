"""STAR, Subspace Boosting and CART: worked by hand on diagonal matrices, and against their formulas in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mergecore import merge
from mergecore.registry import METHODS

Array = NDArray[np.float64]


def change(method: str, deltas: Sequence[Any], name: str = "layers.0.w", **values: Any) -> Array:
    """The merged change of experts that have these, from a base of zeros."""
    tensors = [torch.as_tensor(np.asarray(delta), dtype=torch.float32) for delta in deltas]
    base = {name: torch.zeros_like(tensors[0])}
    merged = merge(METHODS[method].model_validate(values), base=base, experts=[{name: tensor} for tensor in tensors])
    return merged[name].double().numpy()


def close(actual: Array, wanted: Any) -> None:
    np.testing.assert_allclose(actual, np.asarray(wanted), rtol=0, atol=3e-6)


def random(count: int, *shape: int) -> list[Array]:
    draws = np.random.default_rng(1)
    return [draws.normal(size=shape) for _ in range(count)]


# STAR


@pytest.mark.parametrize(
    ("share", "wanted"),
    [(0.4, [10, 0, 0, 0]), (0.41, [40 / 7, 30 / 7, 0, 0]), (0.7, [40 / 7, 30 / 7, 0, 0]), (1.0, [4, 3, 2, 1])],
)
def test_star_by_hand(share: float, wanted: list[float]) -> None:
    """Strengths 4, 3, 2, 1 add up to 10: 4 are 0.4 of it and become 10; 4 and 3 become 10 · 4/7 and 10 · 3/7."""
    close(change("star", [np.diag([2, 4, 1, 3.0])], share=share), np.diag([wanted[i] for i in (2, 0, 3, 1)]))


def star(deltas: Sequence[Array], share: float) -> Array:
    total = np.zeros_like(deltas[0])
    for delta in deltas:
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        rank = int(np.searchsorted(np.cumsum(s), s.sum() * share)) + 1
        total += (u[:, :rank] * (s[:rank] * s.sum() / s[:rank].sum())) @ vt[:rank]
    return total / len(deltas)


@pytest.mark.parametrize("shape", [(7, 5), (5, 9)])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.83])
def test_star_is_the_authors_rule(shape: tuple[int, int], share: float) -> None:
    deltas = random(3, *shape)
    close(change("star", deltas, share=share), star(deltas, share))


def test_star_keeps_the_nuclear_norm() -> None:
    (delta,) = random(1, 6, 8)
    for share in (0.2, 0.5, 0.9):
        kept = np.linalg.svd(change("star", [delta], share=share), compute_uv=False).sum()
        assert kept == pytest.approx(np.linalg.svd(delta, compute_uv=False).sum(), rel=1e-5)


# Subspace Boosting


@pytest.mark.parametrize(
    ("share", "wanted"),
    [(0.0, [6, 6, 6, 0]), (0.01, [6, 6, 6, 0]), (0.6, [6, 6, 6, 0]), (0.61, [6, 3, 3, 0]), (0.9, [6, 3, 3, 0]), (1.0, [6, 3, 1, 0])],
)  # fmt: skip
def test_boosting_by_hand(share: float, wanted: list[float]) -> None:
    """The sum has strengths 6, 3, 1 and 0. What has no strength has no direction either, and stays 0."""
    deltas = [np.diag([4, 1, 1, 0.0]), np.diag([2, 2, 0, 0.0])]
    close(change("subspace_boosting", deltas, scale=0.5, share=share), np.diag(wanted) / 2)


def test_boosting_as_published_fills_what_the_sum_lacks() -> None:
    boosted = change("subspace_boosting", [np.diag([6, 3, 1, 0.0])], scale=1.0, share=0.9, rank="full")
    close(np.abs(boosted), np.diag([6, 3, 3, 3.0]))


def boosted(deltas: Sequence[Array], share: float) -> Array:
    u, s, vt = np.linalg.svd(sum(deltas), full_matrices=False)
    cut = int(np.nonzero(np.cumsum(s) / s.sum() >= share)[0][0])
    return np.asarray((u * np.maximum(s, s[cut])) @ vt)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7])
def test_boosting_is_the_rule(share: float) -> None:
    deltas = random(3, 6, 9)
    close(change("subspace_boosting", deltas, scale=0.4, share=share), 0.4 * boosted(deltas, share))


def test_what_is_no_matrix_is_summed() -> None:
    deltas = random(3, 7)
    close(change("subspace_boosting", deltas, scale=0.4), 0.4 * sum(deltas))
    matrices = random(2, 4, 4)
    close(change("subspace_boosting", matrices, "model.embed_tokens.weight", scale=0.4), 0.4 * sum(matrices))


# CART

DIAGONALS = [np.diag([4, 0.0]), np.diag([0, 4.5]), np.zeros((2, 2))]
"""Mean (4/3, 3/2); differences (8/3, −3/2), (−4/3, 3), (−4/3, −3/2), of which the larger entry stays: (8/3, 3/2) in all."""


@pytest.mark.parametrize(("scale", "wanted"), [(0.0, [4 / 3, 1.5]), (1.0, [4, 3]), (2.0, [20 / 3, 4.5])])
def test_cart_by_hand(scale: float, wanted: list[float]) -> None:
    close(change("cart", DIAGONALS, scale=scale, share=0.5), np.diag(wanted))


def cart(deltas: Sequence[Array], scale: float, count: int) -> Array:
    mean = sum(deltas) / len(deltas)
    total = np.array(mean)
    for delta in deltas:
        u, s, vt = np.linalg.svd(delta - mean, full_matrices=False)
        total = total + scale * (u[:, :count] * s[:count]) @ vt[:count]
    return total


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.4, 2), (0.58, 2), (0.6, 3), (1.0, 5)])
def test_cart_is_the_authors_rule(share: float, count: int) -> None:
    deltas = random(4, 5, 8)
    close(change("cart", deltas, scale=1.7, share=share), cart(deltas, 1.7, count))


def test_cart_at_full_rank_or_none_is_the_average() -> None:
    """Differences from the mean add up to 0."""
    deltas = random(3, 5, 6)
    for share in (0.0, 1.0):
        close(change("cart", deltas, scale=3.0, share=share), sum(deltas) / 3)
    vectors = random(3, 6)
    close(change("cart", vectors, scale=3.0), sum(vectors) / 3)


# All of them


@pytest.mark.parametrize(("method", "rule"), [
    ("star", lambda deltas: star(deltas, 0.4)), ("cart", lambda deltas: cart(deltas, 1.0, 1)),
    ("subspace_boosting", lambda deltas: boosted(deltas, 0.01)),
])  # fmt: skip
def test_convolutions_are_vectors_or_matrices(method: str, rule: Callable[[Sequence[Array]], Array]) -> None:
    values = {"scale": 1.0} if method == "subspace_boosting" else {}
    kernels = random(3, 4, 3, 2, 2)
    vectors = sum(kernels) * (1 if method == "subspace_boosting" else 1 / 3)
    close(change(method, kernels, **values), vectors)
    flat = rule([kernel.reshape(4, 12) for kernel in kernels]).reshape(4, 3, 2, 2)
    close(change(method, kernels, convolutions="flatten", **values), flat)


@pytest.mark.parametrize("method", ["star", "subspace_boosting", "cart"])
def test_changes_of_nothing_change_nothing(method: str) -> None:
    values = {"scale": 1.0} if method == "subspace_boosting" else {}
    assert not change(method, [np.zeros((4, 5))] * 2, **values).any()

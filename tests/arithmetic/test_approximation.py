"""Matching pursuit and nearest neighbours, against NumPy step by step, and what must hold by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mergecore.arithmetic.approximation import matching_pursuit, neighbours

Array = NDArray[np.float64]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pursued(target: Array, points: Array, count: int) -> tuple[list[int], Array]:
    """The textbook: the largest inner product with what is left, then least squares over all chosen so far."""
    left, chosen, weights = target, list[int](), np.zeros(0)
    for _ in range(count):
        likeness = np.abs(points @ left)
        likeness[chosen] = -1
        chosen.append(int(likeness.argmax()))
        weights = np.linalg.lstsq(points[chosen].T, target, rcond=None)[0]
        left = target - points[chosen].T @ weights
    return chosen, weights


@pytest.mark.parametrize("count", [1, 4, 10])
def test_matching_pursuit_is_the_textbook_s(count: int) -> None:
    targets, points = drawn(6, 11), drawn(50, 11, seed=1)
    indices, weights = matching_pursuit(targets, points, count)
    for place, target in enumerate(targets.double().numpy()):
        chosen, wanted = pursued(target, points.double().numpy(), count)
        assert indices[place].tolist() == chosen
        np.testing.assert_allclose(weights[place].numpy(), wanted, rtol=1e-9, atol=1e-9)


def test_matching_pursuit_stops_where_nothing_is_left() -> None:
    """A point itself, more points than dimensions, the same points twice, and zeros: no coefficient runs away."""
    points = drawn(20, 6)
    indices, weights = matching_pursuit(3 * torch.eye(6)[:2], torch.eye(6), 4)
    assert indices[:, 0].tolist() == [0, 1] and weights.tolist() == [[3, 0, 0, 0]] * 2
    for candidates, count in ((points, 15), (torch.cat([points, points]), 12)):
        targets = drawn(3, 6, seed=1)
        indices, weights = matching_pursuit(targets, candidates, count)
        met = torch.einsum("bk,bkd->bd", weights, candidates[indices].double())
        torch.testing.assert_close(met, targets.double(), rtol=1e-6, atol=1e-6)
        assert float(weights.abs().max()) < 50 and int((weights != 0).sum(1).max()) <= 7
        assert all(len(set(row)) == count for row in indices.tolist())
    assert not matching_pursuit(torch.zeros(1, 6), points, 3)[1].any()
    assert not matching_pursuit(targets, torch.zeros(5, 6), 3)[1].any()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("weighting", ["distance", "barycentric", "least_squares"])
@pytest.mark.parametrize("count", [1, 4, 9])
def test_neighbours(metric: Any, weighting: Any, count: int) -> None:
    targets, points = drawn(5, 7), drawn(30, 7, seed=1)
    indices, weights = neighbours(targets, points, count, metric, weighting)
    for place, target in enumerate(targets.double().numpy()):
        whole = points.double().numpy()
        if metric == "euclidean":
            distances = np.sqrt(((whole - target) ** 2).sum(1))
        else:
            distances = 1 - whole @ target / np.linalg.norm(whole, axis=1) / np.linalg.norm(target)
        nearest = np.argsort(distances, kind="stable")[:count]
        assert indices[place].tolist() == nearest.tolist()
        near, actual = whole[nearest], weights[place].numpy()
        if weighting == "distance":
            wanted = 1 / distances[nearest] if metric == "euclidean" else 1 - distances[nearest]
            np.testing.assert_allclose(actual, wanted / wanted.sum(), rtol=1e-4)
        elif weighting == "least_squares":
            np.testing.assert_allclose(actual, np.linalg.pinv(near.T) @ target, rtol=1e-6, atol=1e-9)
        elif count > 7:  # then many fits are exact
            np.testing.assert_allclose(near.T @ actual, target, atol=1e-8)
        else:  # without the last weight, which is what is missing to 1, it is plain least squares
            free = np.linalg.lstsq((near[:-1] - near[-1]).T, target - near[-1], rcond=None)[0]
            np.testing.assert_allclose(actual, [*free, 1 - free.sum()], rtol=1e-6, atol=1e-9)
        if weighting != "least_squares":
            assert actual.sum() == pytest.approx(1)


def test_a_neighbour_at_the_target_is_the_target() -> None:
    points = drawn(8, 5)
    indices, weights = neighbours(points[:3], points, 3, "euclidean", "distance")
    assert indices[:, 0].tolist() == [0, 1, 2]
    assert float((weights[:, 0] - 1).abs().max()) < 1e-4

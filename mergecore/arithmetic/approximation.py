"""A vector as a combination of few others: orthogonal matching pursuit, and nearest neighbours.

What is compared is float32, what is solved float64. Both rules are those of mergekit's `tokensurgeon`; on random points
its public code gave the same. The code here is our own.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mergecore.arithmetic.linear_algebra import ROUNDING

Metric = Literal["euclidean", "cosine"]
Weighting = Literal["distance", "barycentric", "least_squares"]
CLOSEST = 1e-6
"""A distance is taken to be at least this, so that a point at the target does not divide by 0."""


def matching_pursuit(targets: Tensor, points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the indices (B×count) of points and their coefficients that approximate the targets, chosen greedily.

    Each step takes the point whose inner product with what is left of the target is largest in magnitude, and fits the
    target by least squares to all points so far (orthogonal matching pursuit, Pati et al. 1993). A target that is met
    to rounding takes no more: coefficients are 0 from there on, and for points that depend on those before.

    targets: (B, D) float32. points: (N, D) float32, N ≥ count. The coefficients are float64.
    """
    size, width = targets.shape
    wanted = targets.to(torch.float64)
    basis = wanted.new_zeros(size, count, width)
    triangle = torch.eye(count, dtype=torch.float64).repeat(size, 1, 1)
    indices = torch.zeros(size, count, dtype=torch.int64)
    left = wanted.clone()
    rows = torch.arange(size)
    taken = torch.zeros(size, len(points), dtype=torch.bool)
    for step in range(count):
        likeness = (left.to(torch.float32) @ points.mT).abs_().masked_fill_(taken, -1.0)
        chosen = likeness.argmax(1)
        indices[:, step] = chosen
        taken[rows, chosen] = True
        atom = points[chosen].to(torch.float64)
        rest, known = atom.clone(), basis[:, :step]
        for _ in range(2):  # twice is enough for orthogonality to rounding
            share = (known @ rest[:, :, None])[:, :, 0]
            rest -= (share[:, None] @ known)[:, 0]
            triangle[:, :step, step] += share
        norm = rest.norm(dim=1)
        new = (norm > ROUNDING * atom.norm(dim=1)) & (left.norm(dim=1) > ROUNDING * wanted.norm(dim=1))
        triangle[:, step, step] = torch.where(new, norm, 1.0)
        basis[:, step] = torch.where(new[:, None], rest / torch.where(new, norm, 1.0)[:, None], 0.0)
        left -= (left * basis[:, step]).sum(1, keepdim=True) * basis[:, step]
    against = (basis @ wanted[:, :, None])[:, :, 0]
    return indices, torch.linalg.solve_triangular(triangle, against[:, :, None], upper=True)[:, :, 0]


def neighbours(
    targets: Tensor, points: Tensor, count: int, metric: Metric, weighting: Weighting
) -> tuple[Tensor, Tensor]:
    """Return the indices (B×count) of the nearest points, and the weights that approximate each target by them.

    weighting: 'distance': 1/distance, of cosine the similarity, divided by their sum. 'barycentric': the best fit whose
    weights add up to 1. 'least_squares': the best fit. targets: (B, D) float32. points: (N, D) float32, N ≥ count.
    """
    if metric == "cosine":
        lengths = targets.norm(dim=1, keepdim=True) * points.norm(dim=1)
        distances = 1 - (targets @ points.mT) / lengths.clamp(min=CLOSEST)
    else:
        distances = torch.cdist(targets, points, compute_mode="donot_use_mm_for_euclid_dist")
    nearest, indices = torch.sort(distances, dim=1, stable=True)
    nearest, indices = nearest[:, :count].to(torch.float64), indices[:, :count]
    if weighting == "distance":
        weights = 1 - nearest if metric == "cosine" else 1 / nearest.clamp(min=CLOSEST)
        return indices, weights / weights.sum(1, keepdim=True).clamp(min=CLOSEST)
    near, wanted = points[indices].to(torch.float64), targets.to(torch.float64)[:, :, None]
    if weighting == "least_squares":
        return indices, torch.linalg.lstsq(near.mT, wanted, driver="gelsd").solution[:, :, 0]
    products, ones = near @ near.mT, near.new_ones(len(near), count, 1)
    above = torch.cat([products, ones], 2)
    below = torch.cat([ones.mT, near.new_zeros(len(near), 1, 1)], 2)
    right = torch.cat([near @ wanted, near.new_ones(len(near), 1, 1)], 1)
    solved = torch.linalg.lstsq(torch.cat([above, below], 1), right, driver="gelsd").solution
    return indices, solved[:, :count, 0]

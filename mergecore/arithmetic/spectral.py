"""Singular directions of task vectors, as the spectral methods use them (Iso-C, Iso-CTS, TSV-Merge).

Everything is in float64 on the CPU: see `linear_algebra`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergecore.arithmetic.linear_algebra import Rank, decomposition, polar_factor, rank_of


@dataclass(frozen=True)
class Directions:
    """k singular directions of an m×n matrix: left (m×k), strengths (k), right (k×n)."""

    left: Tensor
    strengths: Tensor
    right: Tensor

    def strongest(self, count: int) -> Directions:
        """Return the first `count` of them."""
        return Directions(self.left[:, :count], self.strengths[:count], self.right[:count])


def directions_of(matrix: Tensor, size: float, rank: Rank) -> tuple[Directions, Tensor]:
    """Return the singular directions of a matrix that are to be believed, strongest first, and all min(m, n) strengths.

    size: the Frobenius norm of what the matrix was made of (see `rank_of`).
    """
    left, strengths, right = decomposition(matrix)
    return Directions(left, strengths, right).strongest(rank_of(strengths, size, rank)), strengths


def side_by_side(parts: Sequence[Directions]) -> Directions:
    """Return the directions of all parts, in order."""
    return Directions(
        torch.cat([part.left for part in parts], 1),
        torch.cat([part.strengths for part in parts]),
        torch.cat([part.right for part in parts]),
    )


def orthonormal(directions: Directions, rank: Rank) -> Directions:
    """Return the directions with both sides replaced by their polar factors, the nearest orthonormal matrices."""
    return Directions(polar_factor(directions.left, rank), directions.strengths, polar_factor(directions.right, rank))

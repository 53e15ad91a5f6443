"""How the weights of experts enter sums, sign elections and means of deltas: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import fsum, gcd, lcm
from typing import Literal

import torch
from torch import Tensor

from mergecore.arithmetic.trims import Elect, agreeing, disjoint_mean, divided, elected_sign, folded_sum, signs_of

Aggregate = Literal["sum", "mean", "signed_mean"]
"""How what takes part is joined: see `total` and `joined_agreeing`."""
AGGREGATE = (
    "'mean' divides the sum by the magnitudes of the weights that take part, so a negative weight forgets; "
    "'signed_mean' (mergekit) by their sum, which turns signs where it is negative and has no bound where it is near 0"
)
"""What the means are, for the description of a parameter."""
PIECE = 1 << 15
"""Elements of whole tensors that are joined at a time."""
EXACT = 1 << 29
"""Whole numbers below this, times a float32, are exact in float64."""


def weighted(deltas: Sequence[Tensor], weights: Sequence[float] | None) -> list[Tensor]:
    """Return the deltas times their weights; the deltas themselves without weights."""
    return list(deltas) if weights is None else [delta * weight for delta, weight in zip(deltas, weights, strict=True)]


def strength(scale: float, weights: Sequence[float] | None = None) -> float:
    """Return λ; 0 where all weights are 0, for nothing is added then."""
    return scale if weights is None or any(weights) else 0.0


def divisor(weights: Sequence[float] | None, count: int, aggregate: Aggregate) -> float:
    """Return what the weighted sum of `count` experts is divided by: Σ |w|, or Σ w ('signed_mean'); 1 where it is 0."""
    if weights is None:
        return float(count)
    below = fsum(weights if aggregate == "signed_mean" else map(abs, weights))
    return below if abs(below) >= 1e-8 else 1.0


def total(deltas: Sequence[Tensor], weights: Sequence[float] | None, aggregate: Aggregate) -> Tensor:
    """Return Σ w τ of all deltas, or that divided by their weights."""
    whole = folded_sum(weighted(deltas, weights))
    return whole if aggregate == "sum" else divided(whole, divisor(weights, len(deltas), aggregate))


def whole_weights(weights: Sequence[float]) -> list[float]:
    """Return whole numbers in the same ratio; the weights themselves where those would be too large to be exact.

    0.1, 0.2 and −0.3 are 1, 2 and −3. As binary fractions the three do not add up to 0.
    """
    shares = [Fraction(str(weight)) for weight in weights]
    whole = [int(share * lcm(*(other.denominator for other in shares))) for share in shares]
    whole = [number // max(gcd(*whole), 1) for number in whole]
    return [float(number) for number in whole] if max(map(abs, whole)) <= EXACT else list(weights)


def elected(
    deltas: Sequence[Tensor],
    weights: Sequence[float] | None,
    zero: float | None,
    elect: Elect = "mass",
    shares: Sequence[float] | None = None,
) -> Tensor:
    """Return per coordinate the sign that the weighted deltas elect (see `trims.elected_sign`).

    With weights, mass is counted in float64 by `whole_weights`: what cancels in the weights as written cancels here.
    """
    if weights is None or elect != "mass":
        return elected_sign(weighted(deltas, weights), zero, elect, shares)
    mass = folded_sum([delta.double() * weight for delta, weight in zip(deltas, whole_weights(weights), strict=True)])
    return signs_of(mass, zero)


def joined_agreeing(
    deltas: Sequence[Tensor], weights: Sequence[float] | None, sign: Tensor, aggregate: Aggregate
) -> Tensor:
    """Join per coordinate the weighted deltas of this sign: their sum, or that divided by the weights that take part.

    'mean' is Σ |w| |τ| / Σ |w| with the elected sign, in float64 and rounded once: never more than the largest |τ|.
    'signed_mean' divides by Σ w, where these do not cancel.
    """
    agreed = agreeing(weighted(deltas, weights), sign)
    if aggregate == "sum":
        return folded_sum(agreed)
    if weights is None:
        return disjoint_mean(agreed)
    if aggregate == "signed_mean":
        below = folded_sum(
            [torch.where(delta != 0, weight, 0.0) for delta, weight in zip(agreed, weights, strict=True)]
        )
        return folded_sum(agreed) / torch.where(below == 0, 1.0, below)
    part = [(value != 0).double() for value in agreed]
    above = folded_sum([delta.double() * w * here for delta, w, here in zip(deltas, weights, part, strict=True)])
    below = folded_sum([here * abs(w) for here, w in zip(part, weights, strict=True)])
    return (above / torch.where(below == 0, 1.0, below)).float()


def joined(
    deltas: Sequence[Tensor],
    weights: Sequence[float] | None,
    elect: Literal["none", "mass"],
    aggregate: Aggregate,
) -> Tensor:
    """Join deltas of whole tensors, all or those of the elected sign (0 counts as +): their sum or a mean."""
    flat = [delta.reshape(-1) for delta in deltas]
    result = torch.empty_like(flat[0])
    for start in range(0, result.numel(), PIECE):
        piece = [values[start : start + PIECE] for values in flat]
        result[start : start + PIECE] = (
            total(piece, weights, aggregate)
            if elect == "none"
            else joined_agreeing(piece, weights, elected(piece, weights, 1.0), aggregate)
        )
    return result.reshape(deltas[0].shape)

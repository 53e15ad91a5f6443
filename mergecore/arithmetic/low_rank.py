"""What methods that make adapters share: pruned factors and updates, sign elections among them, cuts to a rank.

The rules of pruning and election are those of PEFT's `add_weighted_adapter`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.linear_algebra import decomposition, nearest_low_rank
from mergecore.arithmetic.trims import RandomDrop, folded_sum
from mergecore.checkpoints.adapters import LowRank, padded
from mergecore.errors import SpecError
from mergecore.identity.draws import drop_limit, random_key, random_words
from mergecore.plugins.adapter_method import Combined, Updates

Of = Annotated[
    Literal["factors", "update"],
    Field(
        description="what is joined: 'factors', the A and the B matrices each by themselves (fast and rough: the "
        "product of sums is not the sum of products), or 'update', the whole B·A, which is then cut to a rank by SVD"
    ),
]
Majority = Literal["total", "frequency"]


# --- pruning ----------------------------------------------------------------------------------------------------------


def largest(values: Tensor, density: float) -> Tensor:
    """Return the tensor with its ⌊density · n⌋ largest magnitudes, and 0 elsewhere. Of equal ones the first stay."""
    if density >= 1:
        return values
    magnitudes = values.abs().reshape(-1)
    count = int(density * len(magnitudes))
    if count == 0:
        return torch.zeros_like(values)
    least = magnitudes.kthvalue(len(magnitudes) - count + 1)[0]
    kept = magnitudes > least
    kept[(magnitudes == least).nonzero()[: count - int(kept.sum()), 0]] = True
    return torch.where(kept.reshape(values.shape), values, 0.0)


def dropped_at_random(values: Tensor, drop: RandomDrop | None, position: int, owner: str, name: str) -> Tensor:
    """Return the tensor with elements dropped by a hash of (seed, owner, name, flat index), and the others rescaled.

    position: the expert's place in fold order. owner: its id. name: the tensor's name, which draws the mask.
    """
    if drop is None:
        return values
    own = drop.of_expert(position)
    rate = own.rate
    assert isinstance(rate, float | int)
    words = random_words(random_key(drop.seed, owner, name), 0, values.numel()).reshape(values.shape)
    left = torch.where(words >= drop_limit(rate), values, 0.0)
    if drop.rescale == "none":
        return left
    if drop.rescale == "inverse":
        return left * (1.0 / (1.0 - rate))
    below = float(left.abs().sum())
    return left * (float(values.abs().sum()) / below) if below else left


# --- joining ----------------------------------------------------------------------------------------------------------


def majority_signs(values: Sequence[Tensor], majority: Majority) -> Tensor:
    """Return per coordinate −1 where the sum of the values (total) or of their signs (frequency) is below 0, else 1."""
    total = folded_sum(values if majority == "total" else [torch.sign(value) for value in values])
    return torch.where(total >= 0, 1.0, -1.0).to(total.dtype)


def mean_of_agreeing(values: Sequence[Tensor], weights: Sequence[float], signs: Tensor) -> Tensor:
    """Return per coordinate Σ w_t v_t over the values that have its sign, divided by how many these are."""
    agreeing = [torch.sign(value) == signs for value in values]
    total = folded_sum(
        [torch.where(agrees, v * w, 0.0) for v, w, agrees in zip(values, weights, agreeing, strict=True)]
    )
    return total / folded_sum([agrees.to(total.dtype) for agrees in agreeing]).clamp(min=1.0)


def shared_out(factors: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return what each adapter's down and up factors are multiplied with, so that their product has its factor.

    Both get the root of the magnitude; the sign goes to the down factor.
    """
    roots = [sqrt(abs(factor)) for factor in factors]
    return [root if factor >= 0 else -root for root, factor in zip(roots, factors, strict=True)], roots


# --- ranks ------------------------------------------------------------------------------------------------------------


def rank_of_parts(
    method: str, of: Of, rank: int | None, module: str, ranks: Sequence[int], shape: Sequence[int]
) -> int:
    """Return the rank of a module made of factors, or of updates: at most `rank`, or the largest of the experts'.

    Raise SpecError where factors of other ranks would be added.
    """
    if of == "update":
        return min(rank or max(ranks), *shape)
    if len(set(ranks)) > 1:
        raise SpecError(
            f"{method}: the adapters have ranks {', '.join(map(str, sorted(set(ranks))))} for '{module}', and factors "
            "of other shapes cannot be added; choose `of: update`, or leave the module out with `select`"
        )
    return ranks[0]


def check_rank(method: str, of: Of, rank: int | None) -> None:
    """Raise SpecError where a rank is asked for that factors do not have."""
    if of == "factors" and rank is not None:
        raise SpecError(f"{method}: rank {rank} is asked for, and `of: factors` keeps the experts' rank; leave one out")


@dataclass(frozen=True)
class Parts:
    """How factors or updates are joined.

    weights, shares: one per expert; of its elements the share stays that has the largest magnitudes. drop: at random,
    before. rank: of the result, where updates are joined; None: the largest of the experts' ranks. scale: the factor of
    the result.
    """

    of: Of
    weights: Sequence[float]
    shares: Sequence[float]
    drop: RandomDrop | None
    rank: int | None
    scale: float

    def pruned(self, values: Tensor, place: int, owner: str, name: str) -> Tensor:
        """Return the values of an expert that stay, and zeros for the others.

        place: the expert's, in fold order. owner: its id. name: the tensor's name.
        """
        return largest(dropped_at_random(values, self.drop, place, owner, name), self.shares[place])


Join = Callable[[Sequence[Tensor], Sequence[float]], Tensor]
"""(values of the experts, a weight for each) → one tensor."""


def joined_parts(module: str, updates: Updates, parts: Parts, join: Join) -> Combined:
    """Return a module joined out of pruned factors, or out of pruned updates that are then cut to the rank."""
    present = [(place, update) for place, update in enumerate(updates) if update is not None]
    weights = [parts.weights[place] for place, _ in present]
    if parts.of == "update":
        name = f"{module}.weight"
        values = [parts.pruned(update_of(update), place, update.owner, name) for place, update in present]
        rank = min(parts.rank or max(update.rank for _, update in present), *values[0].shape)
        return cut(join(values, weights).to(torch.float64) * parts.scale, rank)
    narrow, tall = shared_out([weight * update.scaling for weight, (_, update) in zip(weights, present, strict=True)])
    down = join(
        [parts.pruned(update.down, place, update.owner, f"{module}.lora_A.weight") for place, update in present], narrow
    )
    up = join(
        [parts.pruned(update.up, place, update.owner, f"{module}.lora_B.weight") for place, update in present], tall
    )
    return Combined(down, up * parts.scale, {})


def update_of(update: LowRank) -> Tensor:
    """Return scaling · up @ down, formed in float64 and rounded to float32, as deltas are."""
    return (update.up @ update.down * update.scaling).to(torch.float32)


def cut(matrix: Tensor, rank: int) -> Combined:
    """Return the adapter of that rank whose update is nearest to the matrix (Frobenius), and what it loses."""
    up, down = nearest_low_rank(matrix, rank)
    narrow, tall = padded(down, up, rank)
    lost = float((matrix - up @ down).square().sum())
    return Combined(narrow, tall, {"lost": lost, "whole": float(matrix.square().sum())})


def nearest_adapter(down: Tensor, up: Tensor, rank: int) -> Combined:
    """Return the adapter of that rank whose update is nearest to up @ down (Frobenius), and what it loses.

    The product's singular values are those of the small matrix between two orthonormal bases.
    """
    outer, left = torch.linalg.qr(up)
    inner, right = torch.linalg.qr(down.mT)
    rotated, values, turned = decomposition(left @ right.mT)
    root = values[:rank].sqrt()
    narrow, tall = padded(root[:, None] * (turned[:rank] @ inner.mT), outer @ rotated[:, :rank] * root, rank)
    squares = values * values
    return Combined(narrow, tall, {"lost": float(squares[rank:].sum()), "whole": float(squares.sum())})

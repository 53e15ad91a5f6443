"""Trims, sign elections and means that methods share: pure functions of deltas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from mergecore.identity.content import GRID
from mergecore.identity.draws import drop_limit, random_key, word_key, words_at
from mergecore.identity.numbers import Numbers
from mergecore.plugins.block import Block, flat_index
from mergecore.plugins.per_expert import EACH, ONE, ONE_OR_EACH, each, moved

Share = Annotated[float, Field(ge=0, le=1)]
Shares = Annotated[Annotated[Share, ONE] | Annotated[tuple[Share, ...], EACH], ONE_OR_EACH]
"""One share for all experts, or one per expert in the order of the recipe."""
Elect = Literal["mass", "normfrac", "normmass"]
"""How a coordinate's sign is elected: see `elected_sign`."""
Rate = Annotated[float, Field(ge=0, lt=1)]
Ids = Annotated[
    Literal["tensors", "files"],
    Field(
        description="what stands for an expert in its masks: the digest of its 'tensors', however these are cut into "
        "files, or the digest of its 'files', as in version 0.1.0"
    ),
]


@dataclass(frozen=True)
class Drawn:
    """What `dropped` needs for one block of T experts.

    index: the flat index of each element. keys, limits, factors: per expert the two words of its key, the limit below
    which an element goes, and the factor of the others.
    """

    index: Tensor
    keys: Sequence[tuple[int, int]]
    limits: Sequence[int]
    factors: Sequence[float]


class RandomDrop(Numbers):
    """Drops each element with probability `rate` and rescales what is left (DARE, Yu et al. 2024, §3.1).

    An element is dropped by a hash of (seed, id of the expert, tensor name, flat index): experts have independent
    masks, which are the same for any window, worker or device.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    kind: Literal["random"] = "random"
    rate: Annotated[
        Annotated[Annotated[Rate, ONE] | Annotated[tuple[Rate, ...], EACH], ONE_OR_EACH],
        Field(
            description=(
                "probability that a change is dropped, 0 ≤ rate < 1; or one per expert in the order of the recipe"
            )
        ),
    ]
    rescale: Annotated[
        Literal["inverse", "l1", "none"],
        Field(
            description=(
                "how what is kept is scaled: 'inverse', by 1/(1−rate) (the paper); 'l1', so that each "
                "tensor keeps its l1 norm; 'none', not at all"
            )
        ),
    ] = "inverse"
    seed: Annotated[int, Field(ge=0, description="seed of the masks")] = 0
    ids: Ids = "tensors"

    @property
    def drawn_by(self) -> frozenset[str]:
        """By which ids of the experts masks are drawn."""
        return frozenset({self.ids})

    def of_expert(self, position: int) -> RandomDrop:
        """Return the drop of one expert."""
        return self.model_copy(update={"rate": self.rate[position]}) if isinstance(self.rate, tuple) else self

    def bound(self, order: Sequence[int]) -> RandomDrop:
        """Return the drop with its rates in the new order of the experts."""
        return self.model_copy(update={"rate": moved(self.rate, order)})

    def drawn(self, block: Block, factors: Sequence[float] | None) -> Drawn:
        """Return what `dropped` needs for a block. factors: those of what is left, per expert; None: the drop's own."""
        keys = [word_key(random_key(self.seed, expert, block.name), block.start) for expert in block.ids_by(self.ids)]
        rates = each(self.rate, len(keys))
        chosen = list(factors or [1.0 / (1.0 - rate) if self.rescale == "inverse" else 1.0 for rate in rates])
        return Drawn(flat_index(), keys, [drop_limit(rate) for rate in rates], chosen)


def dropped(deltas: Sequence[Tensor], drawn: Drawn | None) -> list[Tensor]:
    """Return the deltas with dropped elements at 0 and the others times their factor; as they are without a draw."""
    if drawn is None:
        return list(deltas)
    return [
        torch.where(words_at(drawn.index, first, second) >= limit, delta * factor, 0.0)
        for delta, (first, second), limit, factor in zip(deltas, drawn.keys, drawn.limits, drawn.factors, strict=True)
    ]


def trimmed(delta: Tensor, least: float | None, last: int | None = None, index: Tensor | None = None) -> Tensor:
    """Return the delta where |τ| ≥ least, else 0. last: of elements at `least`, keep those up to this flat index.

    least None: nothing is cut. index: the flat index of each element.
    """
    if least is None:
        return delta
    magnitude = delta.abs()
    if last is None or index is None:
        return torch.where(magnitude >= least, delta, 0.0)
    return torch.where((magnitude > least) | ((magnitude == least) & (index <= last)), delta, 0.0)


def folded_sum(values: Sequence[Tensor]) -> Tensor:
    """Return ((v1 + v2) + v3) + …: the order in which all sums over experts are formed."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def largest_magnitude(values: Sequence[Tensor]) -> Tensor:
    """Return the largest |v_t| of every coordinate."""
    largest = values[0].abs()
    for value in values[1:]:
        largest = torch.maximum(largest, value.abs())
    return largest


def divided(values: Tensor, by: float) -> Tensor:
    """Return values / by, correctly rounded. On a GPU torch multiplies with the reciprocal of a Python number."""
    return values / (values.new_full((), by) if isinstance(by, float | int) else by)


def elected_sign(
    deltas: Sequence[Tensor],
    zero: float | None = None,
    elect: Elect = "mass",
    shares: Sequence[float] | None = None,
) -> Tensor:
    """Return per coordinate the sign with more mass (TIES, Yadav et al. 2023, §3.2); `zero` (−1 or 1) where it cancels.

    shares: 1/‖τ_t‖² of every delta, for the other rules of the authors' code, which count τ²/‖τ_t‖², in float64.
    """
    if elect == "mass" or shares is None:
        mass = folded_sum(deltas)
    else:
        parts = [delta.double() * delta.double() * share for delta, share in zip(deltas, shares, strict=True)]
        if elect == "normmass":
            mass = folded_sum([torch.sign(delta) * part for delta, part in zip(deltas, parts, strict=True)])
        else:
            mass, most = torch.sign(deltas[0]), parts[0]
            for delta, part in zip(deltas[1:], parts[1:], strict=True):
                mass = torch.where(part > most, torch.sign(delta), mass)
                most = torch.maximum(most, part)
    return signs_of(mass, zero)


def signs_of(mass: Tensor, zero: float | None) -> Tensor:
    """Return the signs, float32; `zero` where the mass is 0, and 0 there without it."""
    sign = torch.sign(mass).float()
    return sign if zero is None else torch.where(sign == 0, zero, sign)


def added(base: Tensor, change: Tensor, scale: float) -> Tensor:
    """Return θ_0 + λ · change; for λ = 0 the base bit for bit, where −0 + 0 would be +0."""
    return base if scale == 0 else base + change * scale


def agreeing(deltas: Sequence[Tensor], sign: Tensor) -> list[Tensor]:
    """Return the deltas where they have the elected sign, else 0."""
    return [torch.where(delta * sign > 0, delta, 0.0) for delta in deltas]


def disjoint_mean(deltas: Sequence[Tensor]) -> Tensor:
    """Return per coordinate the mean of the deltas that are not 0 there (TIES, §3.3)."""
    count = folded_sum([torch.where(delta != 0, 1.0, 0.0) for delta in deltas])
    return folded_sum(deltas) / count.clamp(min=1.0)


def absolute_sum(values: Tensor) -> float:
    """Return Σ |v| in float64 over grid blocks, folded in order."""
    flat = values.reshape(-1)
    total = 0.0
    for start in range(0, flat.numel(), GRID):
        total += float(flat[start : start + GRID].abs().double().sum())
    return total

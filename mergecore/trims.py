"""Pure delta → delta: the trims that methods share. Nothing here reads a model or keeps state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from mergecore.identity import GRID, drop_limit, random_key, word_key, words_at
from mergecore.method import Block, Index


class RandomDrop(BaseModel):
    """Drops each element with probability `rate` and rescales what is left (DARE, Yu et al. 2024, §3.1).

    An element is dropped by a hash of (seed, expert id, tensor name, flat index): independent masks for the experts,
    the same for any chunk, worker or device.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["random"] = "random"
    rate: Annotated[float, Field(ge=0, lt=1, description="probability of being dropped, 0 ≤ rate < 1")]
    rescale: Annotated[
        Literal["inverse", "l1"],
        Field(description="'inverse': by 1/(1−rate), the paper's; 'l1': so that each tensor keeps its l1 norm"),
    ] = "inverse"
    seed: Annotated[int, Field(ge=0, description="seed of the masks")] = 0

    def drawn(self, block: Block, factors: Sequence[float] | None) -> dict[str, Any]:
        """What `dropped` needs for a block. factors: per expert what is left counts, None for 1/(1−rate)."""
        keys = [word_key(random_key(self.seed, one, block.name), block.start) for one in block.ids]
        chosen = list(factors or [1.0 / (1.0 - self.rate)] * len(block.ids))
        return {"index": Index(), "keys": keys, "limit": drop_limit(self.rate), "factors": chosen}


def dropped(deltas: Sequence[Tensor], drawn: Mapping[str, Any] | None) -> list[Tensor]:
    """The deltas with dropped elements at 0 and the others times their factor; as they are where nothing is drawn."""
    if drawn is None:
        return list(deltas)
    return [
        torch.where(words_at(drawn["index"], first, second) >= drawn["limit"], delta * factor, 0.0)
        for delta, (first, second), factor in zip(deltas, drawn["keys"], drawn["factors"], strict=True)
    ]


def trimmed(delta: Tensor, least: float, last: int | None = None, index: Tensor | None = None) -> Tensor:
    """The delta where |τ| ≥ least, else 0; with a `last` those exactly at it only up to that flat index."""
    magnitude = delta.abs()
    if last is None or index is None:
        return torch.where(magnitude >= least, delta, 0.0)
    return torch.where((magnitude > least) | ((magnitude == least) & (index <= last)), delta, 0.0)


def folded_sum(values: Sequence[Tensor]) -> Tensor:
    """((v1 + v2) + v3) + …: the one order in which sums over experts are formed."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def divided(values: Tensor, by: float) -> Tensor:
    """values / by, correctly rounded: by a number from Python, torch would multiply with its reciprocal on a GPU."""
    return values / (values.new_full((), by) if isinstance(by, float | int) else by)


def elected_sign(deltas: Sequence[Tensor], zero: float | None = None) -> Tensor:
    """The sign of the sum per coordinate (TIES, Yadav et al. 2023, §3.2); `zero` (−1 or 1) where it cancels exactly."""
    sign = torch.sign(folded_sum(deltas))
    return sign if zero is None else torch.where(sign == 0, zero, sign)


def agreeing(deltas: Sequence[Tensor], sign: Tensor) -> list[Tensor]:
    """The deltas where they have the elected sign, else 0."""
    return [torch.where(delta * sign > 0, delta, 0.0) for delta in deltas]


def disjoint_mean(deltas: Sequence[Tensor]) -> Tensor:
    """Per coordinate the mean of the deltas that are not 0 there (TIES, §3.3)."""
    count = folded_sum([torch.where(delta != 0, 1.0, 0.0) for delta in deltas])
    return folded_sum(deltas) / count.clamp(min=1.0)


def absolute_sum(values: Tensor) -> float:
    """Σ |v| in float64 over the fixed grid of blocks, folded in order."""
    flat = values.reshape(-1)
    total = 0.0
    for start in range(0, flat.numel(), GRID):
        total += float(flat[start : start + GRID].abs().double().sum())
    return total

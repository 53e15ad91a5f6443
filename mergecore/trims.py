"""Pure delta → delta: the trims that methods share. Nothing here reads a model or keeps state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from mergecore.identity import GRID, drop_limit, random_key, random_words
from mergecore.method import Block


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

    def kept(self, expert: str, tensor: str, start: int, count: int, device: torch.device) -> Tensor:
        """Which of the elements start … start+count−1 are kept, shape (count,), bool."""
        words = random_words(random_key(self.seed, expert, tensor), start, count, device)
        return words >= drop_limit(self.rate)

    def apply(self, delta: Tensor, kept: Tensor, factor: Tensor | float) -> Tensor:
        """The delta with dropped elements at 0 and the others times `factor` (float32)."""
        return torch.where(kept, delta * factor, 0.0)


def dropped(drop: RandomDrop | None, block: Block, factors: Sequence[float] | None) -> tuple[Tensor, ...]:
    """The block's deltas after the drop; `factors`: per expert the l1 rescaling of this tensor, None for 1/(1−rate)."""
    if drop is None:
        return block.experts
    flat = [delta.reshape(-1) for delta in block.experts]
    chosen = factors or [1.0 / (1.0 - drop.rate)] * len(flat)
    return tuple(
        drop.apply(delta, drop.kept(name, block.name, block.start, delta.numel(), delta.device), factor)
        for delta, name, factor in zip(flat, block.ids, chosen, strict=True)
    )


def trimmed(delta: Tensor, threshold: Tensor, cut: int | None, start: int) -> Tensor:
    """The delta where |τ| ≥ threshold, else 0; with a `cut` the elements exactly at it only up to that flat index."""
    magnitude = delta.abs()
    if cut is None:
        return torch.where(magnitude >= threshold, delta, 0.0)
    index = torch.arange(start, start + delta.numel(), device=delta.device)
    keep = (magnitude > threshold) | ((magnitude == threshold) & (index <= cut))
    return torch.where(keep, delta, 0.0)


def folded_sum(values: Sequence[Tensor]) -> Tensor:
    """((v1 + v2) + v3) + …: the one order in which sums over experts are formed."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def divided(values: Tensor, by: float) -> Tensor:
    """values / by, correctly rounded: by a number from Python, torch would multiply with its reciprocal on a GPU."""
    return values / torch.full((), by, dtype=values.dtype, device=values.device)


def elected_sign(deltas: Sequence[Tensor], zero: int) -> Tensor:
    """The sign of the sum per coordinate (TIES, Yadav et al. 2023, §3.2); `zero` (−1, 0, 1) where it cancels exactly."""
    sign = torch.sign(folded_sum(deltas))
    return torch.where(sign == 0, float(zero), sign) if zero else sign


def agreeing(deltas: Sequence[Tensor], sign: Tensor) -> list[Tensor]:
    """The deltas where they have the elected sign, else 0."""
    return [torch.where(torch.sign(delta) * sign > 0, delta, 0.0) for delta in deltas]


def disjoint_mean(deltas: Sequence[Tensor]) -> Tensor:
    """Per coordinate the mean of the deltas that are not 0 there (TIES, §3.3)."""
    count = folded_sum([(delta != 0).to(torch.float32) for delta in deltas])
    return folded_sum(deltas) / count.clamp(min=1.0)


def absolute_sum(values: Tensor) -> float:
    """Σ |v| in float64 over the fixed grid of blocks, folded in order."""
    flat = values.reshape(-1)
    total = 0.0
    for start in range(0, flat.numel(), GRID):
        total += float(flat[start : start + GRID].abs().double().sum())
    return total

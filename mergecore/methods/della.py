"""DELLA: random drop that spares the larger changes of a row, then sign election and disjoint mean (Deep et al.
2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mergecore.arithmetic.linear_algebra import BLOCK
from mergecore.arithmetic.order_statistics import ascending
from mergecore.arithmetic.trims import Ids, absolute_sum, added
from mergecore.arithmetic.weights import AGGREGATE, Aggregate, joined, strength
from mergecore.identity.draws import random_key, random_words
from mergecore.plugins.block import Block, Per
from mergecore.plugins.by_layer import Scale
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import DeltaMethod
from mergecore.plugins.per_expert import EACH, ONE, ONE_OR_EACH, check_each, each, moved
from mergecore.plugins.statistic import Statistics

Kept = Annotated[float, Field(gt=0, le=1)]
Window = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class DellaArguments:
    """keys: per expert what the random words of the tensor are drawn with."""

    keys: Sequence[tuple[int, int]]


class Della(DeltaMethod[DellaArguments]):
    """Drop changes at random, the small ones of a row more often than the large ones. Then elect signs and average.

    Within a row the probability p of being kept rises linearly with the rank of |τ|. A kept change counts as τ/p
    (§3.1). A row is one entry of the first axis; a tensor of one axis is one row. Of equal magnitudes the later one
    ranks higher. A row of one element is kept with the mean probability. A hash of (seed, expert id, tensor name, flat
    index) decides what is kept.
    """

    name: ClassVar[str] = "della"
    paper: ClassVar[str] = (
        "Deep et al. 2024, DELLA-Merging: reducing interference in model merging through magnitude-based "
        "sampling, arXiv:2406.11617"
    )
    published: ClassVar[tuple[str, ...]] = (
        "the authors' code, of other random masks",
        "`rescale: l1` mergekit's `della` (its epsilon is half of `window`)",
        "with `elect: none, aggregate: sum` its `della_linear`",
    )
    per: ClassVar[Per] = Per.TENSOR

    density: Annotated[
        Annotated[Annotated[Kept, ONE] | Annotated[tuple[Kept, ...], EACH], ONE_OR_EACH],
        Field(description=("mean probability that a change is kept, 1 − the drop rate; or one per expert")),
    ] = 0.7
    window: Annotated[
        Annotated[Annotated[Window, ONE] | Annotated[tuple[Window, ...], EACH], ONE_OR_EACH],
        Field(
            description=(
                "ε, the highest minus the lowest probability, so density ± window/2; 0 is DARE; or one per expert"
            )
        ),
    ] = 0.14
    scale: Annotated[Scale, Field(description="λ, the factor of the joined task vector")] = 1.0
    weights: Annotated[
        tuple[float, ...] | None,
        Field(description="one factor per expert for its pruned changes, before signs are elected; none: 1 each"),
    ] = None
    rescale: Annotated[
        Literal["inverse", "l1", "none"],
        Field(
            description=(
                "how what is kept is scaled: 'inverse', by each element's own 1/p (the paper); 'l1', so "
                "that a tensor keeps its l1 norm (mergekit); 'none', not at all"
            )
        ),
    ] = "inverse"
    elect: Annotated[
        Literal["mass", "none"],
        Field(description=("'mass' joins only changes with the sign of the sum (0 counts as +); 'none' joins all")),
    ] = "mass"
    aggregate: Annotated[
        Aggregate,
        Field(description=f"how the experts that take part in a coordinate are joined; {AGGREGATE}"),
    ] = "mean"
    seed: Annotated[int, Field(ge=0, description="seed of the masks")] = 0
    ids: Ids = "tensors"

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            golden=[
                {},
                {"density": 0.5, "window": 0.5, "rescale": "l1", "elect": "none", "aggregate": "sum", "seed": 5},
            ],
            others=[
                {"density": 0.5, "window": 0.2, "scale": 0.9},
                {"density": [0.5, 0.7, 1], "window": [0.2, 0.1, 0], "weights": [1, -2, 3]},
                {"rescale": "l1", "elect": "none", "aggregate": "sum", "seed": 7},
                {"rescale": "none", "elect": "none", "density": 1.0, "window": 0},
            ],
        )

    @model_validator(mode="after")
    def _probabilities_fit(self) -> Della:
        count = max(len(share) if isinstance(share, tuple) else 1 for share in (self.density, self.window))
        for mean, window in zip(each(self.density, count), each(self.window, count), strict=False):
            half = Fraction(str(window)) / 2
            if Fraction(str(mean)) - half <= 0 or Fraction(str(mean)) + half > 1:
                raise ValueError("density ± window/2 are probabilities: they must lie above 0 and not above 1")
        return self

    def validate_count(self, count: int) -> None:
        for name in ("density", "window", "weights"):
            check_each(name, getattr(self, name), count)

    def bound(self, order: Sequence[int]) -> Della:
        names = ("density", "window", "weights")
        return self.model_copy(update={name: moved(getattr(self, name), order) for name in names})

    def revision(self, count: int) -> int:
        return self.version + (self.weights is not None or self.scale == 0)

    @property
    def drawn_by(self) -> frozenset[str]:
        return frozenset({self.ids})

    @property
    def needs_ids(self) -> bool:
        return True

    @property
    def idempotent(self) -> bool:
        return False

    def probabilities(self, length: int, expert: int = 0) -> Tensor:
        """Return the probability of being kept by rank (0 the smallest |τ|) in a row of `length`, float64 on the CPU.

        expert: its position.
        """
        density, window = (each(value, expert + 1)[expert] for value in (self.density, self.window))
        if length == 1:
            return torch.tensor([density], dtype=torch.float64)
        rank = torch.arange(length, dtype=torch.float64)
        return (rank * (window / (length - 1)) + (density - window / 2)).clamp(max=1.0)

    def pruned(self, delta: Tensor, key: tuple[int, int], expert: int = 0) -> Tensor:
        """Return one expert's task vector of one tensor, in its shape, dropped and rescaled. expert: its position."""
        if delta.numel() == 0:
            return delta
        rows = delta.reshape(delta.shape[0] if delta.ndim > 1 else 1, -1)
        length = rows.shape[1]
        kept = self.probabilities(length, expert)
        unsigned = ((1.0 - kept) * (1 << 32)).round().clamp(0, (1 << 32) - 1)
        limit = (unsigned.to(torch.int64) - (1 << 31)).to(torch.int32).to(delta.device)
        divisor = kept.to(torch.float32).to(delta.device)
        step = max(1, BLOCK // length)
        parts = []
        for first in range(0, len(rows), step):
            piece = rows[first : first + step]
            order = ascending(piece.abs())
            rank = torch.empty_like(order).scatter_(
                1, order, torch.arange(length, device=delta.device).expand_as(order)
            )
            words = random_words(key, first * length, piece.numel(), delta.device).view_as(piece)
            rescaled = piece / divisor[rank] if self.rescale == "inverse" else piece
            parts.append(torch.where(words >= limit[rank], rescaled, 0.0))
        pruned = torch.cat(parts).view(delta.shape)
        left = absolute_sum(pruned) if self.rescale == "l1" else 0.0
        return pruned * (absolute_sum(delta) / left) if left else pruned

    def arguments(self, block: Block, statistics: Statistics) -> DellaArguments:
        return DellaArguments([random_key(self.seed, expert, block.name) for expert in block.ids_by(self.ids)])

    def merge(self, base: Tensor, deltas: Sequence[Tensor], arguments: DellaArguments) -> Tensor:
        """Return θ_0 + λ · (mean or sum of what takes part)."""
        keyed = enumerate(zip(deltas, arguments.keys, strict=True))
        pruned = [self.pruned(delta, key, expert) for expert, (delta, key) in keyed]
        together = joined(pruned, self.weights, self.elect, self.aggregate)
        return added(base, together, strength(self.scale, self.weights))

"""The sum of task vectors, each freed of what the sum before it already holds: OPCM's state (Tang et al. 2025).

The sum is not normalised: scaling all of it changes neither singular vectors nor the shares of singular values, so the
factor λ_t is needed only where a model is made (specs §8a, "lazy").
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.linear_algebra import (
    Excluded,
    Stacks,
    by_matrix,
    decomposition,
    keyed,
    matrix_of,
    rank_of,
    squared_norm,
    wide,
)
from mergecore.checkpoints.architectures import EMBEDDINGS
from mergecore.plugins.block import Block
from mergecore.plugins.chain import BEFORE, Link
from mergecore.plugins.statistic import Found, Statistics
from mergecore.tensors.source import TensorInfo, TensorSource

Share = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description=(
            "α, a share of the sum of the singular values. The leading directions that make up at "
            "most this share are closed to later experts; 1 closes all of them"
        ),
    ),
]
Projection = Annotated[
    Literal["block", "strict"],
    Field(
        description=(
            "what is removed from a task vector, besides its diagonal, in the singular bases of the "
            "sum so far: 'block', the leading columns of the leading rows (the authors' code); "
            "'strict', all leading rows and columns (the paper's printed sum)"
        )
    ),
]
NORMS = "/norms"
"""Suffix of a tensor's name: its ‖τ‖² and ‖S‖², float64."""


class ProjectedSum(Link):
    """S_t = S_{t−1} + P(τ_t) in float32, P onto what S_{t−1} leaves free. Whatever is no matrix is added as it is."""

    name: ClassVar[str] = "projected_sum"

    share: Share = 0.5
    projection: Projection = "block"
    excluded: Excluded = EMBEDDINGS
    stacks: Stacks = None

    def parameters(self) -> dict[str, Any]:
        """Return the fields as plain JSON. Without stacks in the model there is no key for them."""
        return keyed(super().parameters())

    def outputs(self, selection: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
        """Return the sum, float32, and two squared norms for each tensor."""
        sums = {name: TensorInfo("F32", info.shape) for name, info in selection.items()}
        return {**sums, **{name + NORMS: TensorInfo("F64", (2,)) for name in selection}}

    def merge_block(self, block: Block, statistics: Statistics) -> dict[str, Tensor]:
        """Return the sum with one more expert, and the squared norms of its delta and of the sum."""
        delta = block.experts[0].cpu()
        earlier = next(iter(statistics[BEFORE]), None)
        total = delta
        if earlier is not None and block.name in earlier.tensors.tensors:
            before = earlier.tensors.read(block.name).reshape(block.shape)
            matrix = matrix_of(block.name, block.shape, "mean", self.excluded, self.stacks)
            if matrix is None:
                total = (before.to(torch.float64) + delta).to(torch.float32)
            else:
                total = by_matrix(before, [delta], matrix, lambda part, parts: self._added(part, parts[0]))
        norms = torch.tensor([squared_norm(delta), squared_norm(total)], dtype=torch.float64)
        return {block.name: total, block.name + NORMS: norms}

    def _added(self, before: Tensor, delta: Tensor) -> Tensor:
        """Return the sum of one matrix, float32, with what it leaves free of a delta."""
        matrix = (before.shape[0], before.shape[1])
        free = projected(wide(delta, matrix), wide(before, matrix), self.share, self.projection)
        return (wide(before, matrix) + free).to(torch.float32)

    def numbers(
        self, written: TensorSource, selection: Mapping[str, TensorInfo], statistics: Statistics
    ) -> dict[str, Any]:
        """Return count t, norm_sum Σ‖τ_i‖, norm ‖S_t‖ and λ_t = ‖S_t‖ / mean ‖τ_i‖, over the selected tensors."""
        arrived = total = 0.0
        for name in sorted(selection):
            came, now = written.read(name + NORMS).tolist()
            arrived, total = arrived + came, total + now
        earlier = next(iter(statistics[BEFORE]), None)
        count = 1 + (earlier.numbers["count"] if earlier else 0)
        norm_sum = sqrt(arrived) + (earlier.numbers["norm_sum"] if earlier else 0.0)
        strength = sqrt(total) / (norm_sum / count) if norm_sum else 1.0
        return {"count": count, "norm_sum": norm_sum, "norm": sqrt(total), "lambda": strength}


def projected(delta: Tensor, before: Tensor, share: float, projection: Projection) -> Tensor:
    """Return P(τ): τ without its diagonal and its leading part in the singular bases of `before`.

    The thin decomposition is exact. With 'block' nothing outside the bases is taken out; with 'strict' the leading
    vectors alone say what is. Directions whose singular value is not above rounding do not belong to `before`: the
    library picks them, and nothing is taken out along them.
    """
    left, values, right = decomposition(before)
    kept = rank_of(values, float(before.norm()), "numerical")
    left, right = left[:, :kept], right[:kept]
    leading = closed(values[:kept], share)
    core = left.mT @ delta @ right.mT
    if projection == "strict":
        outer, inner = left[:, :leading], right[:leading]
        delta = delta - outer @ (outer.mT @ delta)
        delta = delta - (delta @ inner.mT) @ inner
    taken = torch.diag(core.diagonal())
    taken[:leading, :leading] = core[:leading, :leading] if projection == "block" else 0.0
    return delta - left @ taken @ right


def closed(values: Tensor, share: float) -> int:
    """Return how many leading values (descending) make up at most `share` of their sum; all of them for 1."""
    if share >= 1 or len(values) == 0:
        return len(values)
    return int((values.cumsum(0) / values.sum() <= share).sum())


def merged_factor(link: Found) -> float:
    """Return mean ‖τ_i‖ / ‖S_t‖: times this factor, the sum is the merged task vector."""
    numbers = link.numbers
    return float(numbers["norm_sum"] / numbers["count"] / numbers["norm"]) if numbers["norm"] else 1.0

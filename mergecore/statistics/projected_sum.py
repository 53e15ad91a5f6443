"""The sum of task vectors, each freed of what the sum before it already holds: OPCM's state (Tang et al. 2025).

The un-normalised form: singular vectors and the shares of singular values do not change when all are scaled, so the
factor λ_t of every arrival needs to be known only where a model is made (specs §8a, "lazy").
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.linear_algebra import Excluded, decomposition, matrix_of, rank_of, squared_norm, wide
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
        description="α: the leading singular directions whose values make up at most this share of their sum are closed "
        "to later experts; 1 closes all of them",
    ),
]
Projection = Annotated[
    Literal["block", "strict"],
    Field(
        description="what is taken out of a task vector besides its diagonal, in the singular bases of the sum so far: "
        "'block' the leading rows' leading columns (the authors' code), 'strict' all of the leading rows and columns (the "
        "paper's printed sum)"
    ),
]
NORMS = "/norms"
"""Behind a tensor's name: its ‖τ‖² and ‖S‖², float64."""


class ProjectedSum(Link):
    """S_t = S_{t−1} + P(τ_t) in float32 with P onto what S_{t−1} leaves free; whatever is no matrix is added as it is."""

    name: ClassVar[str] = "projected_sum"

    share: Share = 0.5
    projection: Projection = "block"
    excluded: Excluded = EMBEDDINGS

    def outputs(self, selection: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
        """Per tensor the sum in float32, and two squared norms."""
        sums = {name: TensorInfo("F32", info.shape) for name, info in selection.items()}
        return {**sums, **{name + NORMS: TensorInfo("F64", (2,)) for name in selection}}

    def merge_block(self, block: Block, statistics: Statistics) -> dict[str, Tensor]:
        """The sum with one more expert, and the squared norms of what came and of what there is now."""
        delta = block.experts[0].cpu()
        earlier = next(iter(statistics[BEFORE]), None)
        total = delta
        if earlier is not None and block.name in earlier.tensors.tensors:
            held = earlier.tensors.read(block.name).reshape(block.shape)
            matrix = matrix_of(block.name, block.shape, "mean", self.excluded)
            if matrix is None:
                total = (held.to(torch.float64) + delta).to(torch.float32)
            else:
                free = projected(wide(delta, matrix), wide(held, matrix), self.share, self.projection)
                total = (wide(held, matrix) + free).to(torch.float32).reshape(block.shape)
        norms = torch.tensor([squared_norm(delta), squared_norm(total)], dtype=torch.float64)
        return {block.name: total, block.name + NORMS: norms}

    def numbers(
        self, written: TensorSource, selection: Mapping[str, TensorInfo], statistics: Statistics
    ) -> dict[str, Any]:
        """count t, norm_sum Σ‖τ_i‖, norm ‖S_t‖ and λ_t = ‖S_t‖ / mean ‖τ_i‖, norms over the selected tensors."""
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
    """P(τ), orthogonal to `before`: τ without its diagonal and its leading part in the singular bases of `before`.

    The thin decomposition is enough, and exact: outside of the bases nothing is taken out (block), or what is taken out
    follows from the leading vectors alone (strict). Directions whose singular value is no more than rounding are no
    directions of `before`: the library picks them, and nothing is taken out along them.
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
    """How many leading singular values (descending) make up at most `share` of their sum; all of them for 1."""
    if share >= 1 or len(values) == 0:
        return len(values)
    return int((values.cumsum(0) / values.sum() <= share).sum())


def merged_factor(found: Found) -> float:
    """mean ‖τ_i‖ / ‖S_t‖, which makes the sum the merged task vector."""
    numbers = found.numbers
    return float(numbers["norm_sum"] / numbers["count"] / numbers["norm"]) if numbers["norm"] else 1.0

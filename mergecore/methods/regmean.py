"""RegMean: of every linear layer the weight whose outputs are nearest to the experts' (Jin et al. 2023, §3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergecore.plugins.any_statistic import AnyStatistic
from mergecore.plugins.block import Block, Per
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import WeightMethod
from mergecore.plugins.per_expert import check_weights, moved
from mergecore.plugins.statistic import Statistics
from mergecore.statistics.gram import Gram


@dataclass(frozen=True)
class RegMeanArguments:
    """Per expert its Gram of a layer, None where no token reached it, and its weight c_t. No Grams: the weighted mean.

    transposed: the layer is kept as (in, out).
    """

    grams: Sequence[Tensor | None]
    weights: Sequence[float]
    transposed: bool = False


class RegMean(WeightMethod[RegMeanArguments]):
    """The least-squares merge of linear layers: outputs near each expert's on that expert's inputs; else the mean.

    Inputs are unlabelled and taken of each expert's own tasks. Biases, norms, embeddings, heads and layers that no
    token reached get the weighted mean. So do directions of the input that nobody saw.
    """

    name: ClassVar[str] = "regmean"
    per: ClassVar[Per] = Per.TENSOR
    working: ClassVar[float] = 16.0
    paper: ClassVar[str] = (
        "Jin et al. 2023, Dataless knowledge fusion by merging weights of language models, arXiv:2212.09849"
    )

    alpha: Annotated[
        float,
        Field(
            ge=0, le=1, description="factor of the Grams' off-diagonal; the authors use 0.1 for T5 and 0.9 elsewhere"
        ),
    ] = 0.9
    weights: Annotated[
        tuple[Annotated[float, Field(ge=0)], ...] | None,
        Field(description="c_t, one per expert in the order of the recipe; none: equal"),
    ] = None
    ridge: Annotated[
        float, Field(gt=0, description="added to the diagonal of the summed Grams, as a share of its mean")
    ] = 1e-6
    gram: Annotated[Gram, Field(description="how the Gram matrices are worked out")] = Gram()

    @classmethod
    def examples(cls) -> Examples:
        return Examples(golden=[{}, {"alpha": 0.1, "weights": [1, 0, 2]}], others=[{"alpha": 0.0}])

    def statistics(self) -> Mapping[str, AnyStatistic]:
        return {"gram": self.gram}

    def validate_count(self, count: int) -> None:
        check_weights(self.weights, count)

    def bound(self, order: Sequence[int]) -> RegMean:
        return self if self.weights is None else self.model_copy(update={"weights": moved(self.weights, order)})

    def arguments(self, block: Block, statistics: Statistics) -> RegMeanArguments:
        known = statistics["gram"]
        weights = self.weights or (1.0,) * len(known)
        leader = known[0].numbers["layers"].get(block.name)
        if leader is None:
            return RegMeanArguments([], weights)
        grams = [
            result.tensors.read(leader).view(result.tensors.tensors[leader].shape)
            if result.numbers["tokens"][leader]
            else None
            for result in known
        ]
        return RegMeanArguments(grams, weights, block.name in known[0].numbers["transposed"])

    def merge(self, weights: Sequence[Tensor], arguments: RegMeanArguments) -> Tensor:
        """Return W̄ + ((ΣG̃ + εI)⁻¹ Σ G̃_t (W_t − W̄)ᵀ)ᵀ in float64, by Cholesky; equal experts give the expert."""
        shares, total = arguments.weights, fsum(arguments.weights)
        first = weights[0].double()
        mean = first + sum(
            (c / total * (weight.double() - first) for c, weight in zip(shares, weights, strict=True)), 0.0
        )
        summed, right = None, None
        for gram, c, weight in zip(arguments.grams, shares, weights, strict=False):
            if gram is None or c == 0:
                continue
            own = c * self._shrunk(gram.double())
            away = weight.double() - mean
            part = own @ (away if arguments.transposed else away.T)
            summed, right = (own, part) if summed is None or right is None else (summed + own, right + part)
        if summed is None or right is None or not (trace := float(summed.trace())) > 0:
            return mean.to(torch.float32)
        summed.diagonal().add_(self.ridge * trace / len(summed))
        moved_by = torch.cholesky_solve(right, torch.linalg.cholesky(summed))
        return (mean + (moved_by if arguments.transposed else moved_by.T)).to(torch.float32)

    def _shrunk(self, gram: Tensor) -> Tensor:
        """αG + (1−α) diag G."""
        return gram * self.alpha + torch.diag(gram.diagonal() * (1 - self.alpha))

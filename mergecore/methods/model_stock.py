"""Model Stock: interpolates between base and mean by the angle between the experts (Jang et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.linear_algebra import Shares, base_and_mean, combined, gram
from mergecore.errors import SpecError
from mergecore.plugins.block import Block, Per
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import DeltaMethod
from mergecore.plugins.statistic import Statistic, Statistics
from mergecore.statistics.products import Products, gram_of


class ModelStock(DeltaMethod[Shares]):
    """Go from the base towards the mean of the experts: θ = t · mean(θ_t) + (1 − t) · θ_0, with t = N cos Ω / (1 + (N −
    1) cos Ω).

    Ω is the angle between the experts' task vectors, N is the number of experts. Every tensor has its own t.
    """

    name: ClassVar[str] = "model_stock"
    paper: ClassVar[str] = (
        "Jang et al. 2024, Model Stock: all we need is just a few fine-tuned models, arXiv:2403.19522"
    )
    published: ClassVar[tuple[str, ...]] = (
        "`negative: extrapolate` mergekit's `model_stock`, `group: filter` its `filter_wise`, without its absolute "
        "guards",
        "`angle: mean_angle` fusion_bench's",
    )
    version: ClassVar[int] = 2

    angle: Annotated[
        Literal["mean_cosine", "mean_angle"],
        Field(
            description=(
                "how the angle of more than two experts is formed (the paper does not say): 'mean_cosine' "
                "takes the mean of the pairs' cosines (mergekit), 'mean_angle' the cosine of the mean "
                "angle (fusion_bench)"
            )
        ),
    ] = "mean_cosine"
    group: Annotated[
        Literal["tensor", "filter"],
        Field(description="one t per tensor (the paper's layer-wise), or per output unit, the first dimension"),
    ] = "tensor"
    negative: Annotated[
        Literal["clamp", "extrapolate"],
        Field(
            description="experts more than 90° apart: stay at the base, or the formula as it stands, which leaves the "
            "base away from the experts, ever further up to a pole where they cancel; at the pole and beyond it, where "
            "`mean_angle` of four or more may be, the result is the base"
        ),
    ] = "clamp"

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            others=[
                {"angle": "mean_angle"},
                {"group": "filter"},
                {"angle": "mean_angle", "group": "filter"},
                {"negative": "extrapolate"},
            ],
        )

    @property
    def per(self) -> Per:  # type: ignore[override]
        # Of whole tensors t is known beforehand.
        return Per.TENSOR if self.group == "filter" else Per.ELEMENT

    def statistics(self) -> Mapping[str, Statistic]:
        return {} if self.group == "filter" else {"products": Products(of="deltas")}

    def arguments(self, block: Block, statistics: Statistics) -> Shares:
        """Return how much of the base, all of it, and of every task vector: t/N of the tensor."""
        if self.group == "filter":
            return Shares()
        count = len(block.ids)
        ratio = float(self._ratios(gram_of(block.name, count, statistics)[None]))
        return Shares([1.0] + [ratio / count] * count)

    def validate_count(self, count: int) -> None:
        if count < 2:
            raise SpecError("model_stock measures the angle between experts: give at least two")

    def merge(self, base: Tensor, deltas: Sequence[Tensor], arguments: Shares) -> Tensor:
        """Return θ_0 + t · mean(τ_t)."""
        if self.group == "tensor":
            return combined(arguments.shares, [base, *deltas])
        rows = base.shape[0] if base.ndim > 1 else 1
        ratios = self._ratios(gram(deltas, rows))
        full = base_and_mean(torch.zeros_like(base), deltas, 1.0).to(torch.float64)
        spread = ratios.to(base.device).reshape(-1, *[1] * (base.ndim - 1))
        return (base.to(torch.float64) + spread * full).to(torch.float32)

    def _ratios(self, products: Tensor) -> Tensor:
        """Return t of each row, float64, from the experts' inner products (rows, T, T)."""
        count = products.shape[1]
        norms = products.diagonal(dim1=1, dim2=2).sqrt()
        lengths = norms[:, :, None] * norms[:, None, :]
        # No absolute guard: short task vectors have an angle like long ones. Zero ones have none and count as 90°.
        cosines = torch.where(lengths > 0, products / lengths, 0.0).clamp(-1.0, 1.0)
        first, second = torch.triu_indices(count, count, offset=1)
        pairs = cosines[:, first, second]
        cosine = pairs.mean(1) if self.angle == "mean_cosine" else pairs.acos().mean(1).cos()
        if self.negative == "clamp":
            cosine = cosine.clamp(min=0.0)
        below = 1 + (count - 1) * cosine
        # At the pole the experts' mean is 0 and any t gives the base; beyond it the formula changes sign.
        return torch.where(below > 1e-9, count * cosine / below, 0.0)

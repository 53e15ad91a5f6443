"""NuSLERP: two experts joined along an arc, of their weights or of their changes, by weight (as mergekit's
`nuslerp`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from mergecore.arithmetic.linear_algebra import Shares, combined, gram, row_combination
from mergecore.errors import SpecError
from mergecore.plugins.block import Block, Per
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import Method, On
from mergecore.plugins.per_expert import experts_given, moved
from mergecore.plugins.statistic import Statistic, Statistics
from mergecore.statistics.products import Products, gram_of


class Nuslerp(Method[Shares]):
    """Go along the arc from the first of two experts to the second. The weights say how far.

    The place on the arc is t = w_2 / (w_1 + w_2). A negative weight gives a t outside 0 … 1, and the arc is prolonged.
    Directions are those of whole tensors, or of each row or column. Vectors of length 0, parallel vectors and opposite
    vectors are joined along the straight line.
    """

    name: ClassVar[str] = "nuslerp"
    paper: ClassVar[str] = "none; mergekit's code. The arc is Shoemake's (1985)"
    version: ClassVar[int] = 2
    published: ClassVar[tuple[str, ...]] = (
        "mergekit's `nuslerp` without a base",
        "`of: deltas` with one",
        "`along: rows` its `nuslerp_flatten: false`",
        "`along: columns` its `nuslerp_flatten: false, nuslerp_row_wise: true`, which goes along the first axis",
    )

    weights: Annotated[
        tuple[float, float],
        Field(description=("one weight per expert, in the order of the recipe; only their ratio counts")),
    ] = (1.0, 1.0)
    of: Annotated[
        Literal["weights", "deltas"],
        Field(description=("what is joined: 'weights', the experts' weights; 'deltas', their task vectors")),
    ] = "weights"
    along: Annotated[
        Literal["tensor", "rows", "columns"],
        Field(
            description=(
                "what has a direction: 'tensor', a whole tensor; 'rows', each vector along its last axis; "
                "'columns', each vector along its first axis"
            )
        ),
    ] = "tensor"

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            golden=[{"weights": [3, 1]}, {"weights": [1, 3], "of": "deltas", "along": "columns"}],
            others=[
                *({"weights": [3, 1], "along": along} for along in ("rows", "columns")),
                *({"weights": [3, 1], "of": "deltas", "along": along} for along in ("tensor", "rows", "columns")),
            ],
        )

    @field_validator("weights")
    @classmethod
    def _add_up(cls, weights: tuple[float, float]) -> tuple[float, float]:
        if sum(weights) == 0:
            raise ValueError("the weights add up to 0: there is no ratio between them")
        return weights

    @property
    def per(self) -> Per:  # type: ignore[override]
        # Directions of whole tensors are known beforehand.
        return Per.ELEMENT if self.along == "tensor" else Per.TENSOR

    @property
    def on(self) -> On:
        return self.of

    def statistics(self) -> Mapping[str, Statistic]:
        return {"products": Products(of=self.of)} if self.along == "tensor" else {}

    def arguments(self, block: Block, statistics: Statistics) -> Shares:
        if self.along != "tensor":
            return Shares()
        return Shares([float(share) for share in self._shares(gram_of(block.name, 2, statistics)[None])])

    def validate_count(self, count: int) -> None:
        if count != 2:
            raise SpecError(f"nuslerp joins two experts, {experts_given(count)}; use multislerp or karcher for more")

    def bound(self, order: Sequence[int]) -> Nuslerp:
        return self.model_copy(update={"weights": moved(self.weights, order)}) if len(order) == 2 else self

    def merge_models(self, models: Sequence[Tensor], arguments: Shares) -> Tensor:
        """Return (sin((1−t)Ω) a + sin(tΩ) b) / sin Ω; of deltas likewise, on top of the base."""
        joined = list(models) if self.of == "weights" else [*models[1:], models[0]]
        if self.along == "tensor":
            return combined([*arguments.shares, 1.0][: len(joined)], joined)
        if self.along == "columns" and joined[0].ndim > 1:
            return self._by_rows([tensor.movedim(0, -1) for tensor in joined]).movedim(-1, 0)
        return self._by_rows(joined)

    def _by_rows(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the first two joined, row by row along the last axis, plus the others."""
        rows = 1
        if tensors[0].ndim > 1 and tensors[0].numel():
            rows = tensors[0].numel() // tensors[0].shape[-1]
        first, second = self._shares(gram(tensors[:2], rows))
        whole = [torch.ones_like(first)] * (len(tensors) - 2)
        return row_combination(torch.stack([first, second, *whole]), tensors)

    def _shares(self, products: Tensor) -> tuple[Tensor, Tensor]:
        """Return per row how much of either vector, float64, from the inner products (rows, 2, 2)."""
        t = self.weights[1] / sum(self.weights)
        norms = products.diagonal(dim1=1, dim2=2).sqrt()
        length = norms[:, 0] * norms[:, 1]
        angle = torch.where(length > 0, products[:, 0, 1] / length, 1.0).clamp(-1.0, 1.0).acos()
        straight = angle.sin() < 1e-7
        below = torch.where(straight, 1.0, angle.sin())
        first = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / below)
        return first, torch.where(straight, t, (t * angle).sin() / below)

"""SCE: select by variance, calculate matrix weights, erase minority signs (Wan et al. 2024, FuseChat; as in
mergekit)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import floor
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.linear_algebra import blocks
from mergecore.arithmetic.order_statistics import largest
from mergecore.arithmetic.trims import folded_sum
from mergecore.plugins.block import Per
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import DeltaMethod, NoArguments


class Sce(DeltaMethod[NoArguments]):
    """Keep the coordinates in which the experts differ most. Weigh each expert's tensor by the size of its changes
    there.
    """

    name: ClassVar[str] = "sce"
    paper: ClassVar[str] = "Wan et al. 2024, FuseChat: knowledge fusion of chat models, arXiv:2408.07990"
    published: ClassVar[tuple[str, ...]] = (
        "mergekit's `sce` (density is its `select_topk`), without its absolute guards",
    )
    per: ClassVar[Per] = Per.TENSOR

    density: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description=(
                "share of the coordinates that is kept. Only coordinates in which the experts differ are "
                "counted; 1 keeps all of them"
            ),
        ),
    ] = 1.0

    @classmethod
    def examples(cls) -> Examples:
        return Examples(golden=[{}, {"density": 0.3}])

    def merge(self, base: Tensor, deltas: Sequence[Tensor], arguments: NoArguments) -> Tensor:
        """Return θ_0 + Σ η_t τ_t / Σ η_t over the experts with the sign of Σ τ_t, on the selected coordinates."""
        kept = self._selected(deltas)
        weights = _matrix_weights(deltas, kept)
        result = torch.empty(base.numel(), dtype=torch.float32, device=base.device)
        for part, (origin, *changes) in blocks([base, *deltas]):
            total = folded_sum(changes)
            sign = torch.where(total >= 0, 1.0, -1.0)
            above, below = torch.zeros_like(origin), torch.zeros_like(origin)
            for change, weight in zip(changes, weights, strict=True):
                agrees = kept[part] & (change * sign > 0)
                above = above + torch.where(agrees, change * weight, 0.0)
                below = below + torch.where(agrees, weight, 0.0)
            result[part] = origin + torch.where(below > 0, above / below, 0.0)
        return result.reshape(base.shape)

    def _selected(self, deltas: Sequence[Tensor]) -> Tensor:
        """Return which coordinates are kept, flat: those of the largest variance; of equal ones the first.

        Where nothing varies (one expert, equal experts) there is nothing to choose by, and all of them stay.
        """
        count = deltas[0].numel()
        everything = torch.ones(count, dtype=torch.bool, device=deltas[0].device)
        if self.density == 1 or count == 0:
            return everything
        # Float64: equal float32 values then have a variance of exactly 0.
        variance = torch.empty(count, dtype=torch.float64, device=deltas[0].device)
        for part, changes in blocks(deltas):
            mean = folded_sum(changes) / len(changes)
            squares = [(change - mean) * (change - mean) for change in changes]
            variance[part] = folded_sum(squares) / len(changes)
        differing = int((variance > 0).sum())
        if differing == 0:
            return everything
        wanted = floor(Fraction(str(self.density)) * differing)
        return largest(variance[None], wanted)[0]


def _matrix_weights(deltas: Sequence[Tensor], kept: Tensor) -> list[float]:
    """Return η_t: each expert's share of the squared change on the kept coordinates; equal where nothing changes at
    all."""
    squares = []
    for delta in deltas:
        square = 0.0
        for part, (change,) in blocks([delta]):
            square += float(torch.where(kept[part], change * change, 0.0).sum())
        squares.append(square)
    total = sum(squares)
    return [square / total for square in squares] if total > 0 else [1.0 / len(squares)] * len(squares)

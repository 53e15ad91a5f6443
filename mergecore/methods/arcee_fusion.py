"""Arcee fusion: an expert's weights where its changes stand out, the base's elsewhere (Arcee 2024; as in mergekit)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.linear_algebra import BLOCK
from mergecore.arithmetic.order_statistics import order_statistics
from mergecore.errors import SpecError
from mergecore.plugins.block import Per
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import NoArguments, WeightMethod
from mergecore.plugins.per_expert import experts_given


class ArceeFusion(WeightMethod[NoArguments]):
    """Score every weight of the expert, and take those that stand out. The others stay as in the base.

    The score is |θ_1 − θ_0| times the divergence of the row's softmax. A row runs along the last axis. A weight stands
    out if its score is at least median + fence × (third − first quartile). Quartiles are elements of the tensor, at
    ⌊q(n − 1)⌋ in ascending order. They are exact for any number of elements; mergekit draws a million. Softmax and
    divergence are computed in float64, because in float32 the divergence of a small change is noise.
    """

    name: ClassVar[str] = "arcee_fusion"
    paper: ClassVar[str] = "none; Arcee 2024, described by mergekit's code alone"
    per: ClassVar[Per] = Per.TENSOR
    published: ClassVar[tuple[str, ...]] = (
        "mergekit's `arcee_fusion`, with exact quartiles and in float64, so that its choice of single weights differs",
    )

    fence: Annotated[
        float, Field(ge=0, description=("how many interquartile ranges above the median outliers begin"))
    ] = 1.5
    smoothing: Annotated[
        float, Field(ge=0, le=1e-3, description="added to every probability before the divergence is taken")
    ] = 1e-8

    @classmethod
    def examples(cls) -> Examples:
        return Examples(others=[{"fence": 0, "smoothing": 0}])

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def idempotent(self) -> bool:
        return False

    def validate_count(self, count: int) -> None:
        if count != 1:
            raise SpecError(f"arcee_fusion fuses the base with one expert, {experts_given(count)}")

    def merge(self, weights: Sequence[Tensor], arguments: NoArguments) -> Tensor:
        """Return θ_1 where its importance reaches the threshold, θ_0 elsewhere."""
        base, expert = weights
        if base.numel() == 0:
            return base
        scores = self.importance(base, expert)
        first, median, third = order_statistics(scores, [quarter * (scores.numel() - 1) // 4 for quarter in (1, 2, 3)])
        chosen = (scores >= median + self.fence * (third - first)).reshape(base.shape).to(base.device)
        return torch.where(chosen, expert, base)

    def importance(self, base: Tensor, expert: Tensor) -> Tensor:
        """Return |θ_1 − θ_0| · KL(softmax of the expert's row ‖ that of the base's row), flat, float64."""
        scores = torch.empty(base.numel(), dtype=torch.float64)
        for part, origin, changed in _rows(base, expert):
            before = origin.softmax(1) + self.smoothing
            after = changed.softmax(1) + self.smoothing
            divergence = (after * (after.log() - before.log())).sum(1, keepdim=True).clamp(min=0.0)
            scores[part] = ((changed - origin).abs() * divergence).reshape(-1)
        return scores


def _rows(base: Tensor, expert: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield both tensors in float64, some rows at a time, with the slice of the flat tensor that these are."""
    length = base.shape[-1] if base.ndim else 1
    pair = [tensor.reshape(-1, length) for tensor in (base, expert)]
    step = max(1, BLOCK // length)
    for start in range(0, len(pair[0]), step):
        first, second = (rows[start : start + step].to("cpu", torch.float64) for rows in pair)
        yield slice(start * length, start * length + first.numel()), first, second

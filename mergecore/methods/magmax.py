"""MagMax: of every coordinate the largest change of all experts (Marczak et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergecore.plugins.by_layer import Scale
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import DeltaMethod, NoArguments


class Magmax(DeltaMethod[NoArguments]):
    """Take, in every coordinate, the change of the expert that changed it most, times a factor.

    Of equally large changes the later expert's is taken, in the order of the recipe, as in the authors' code. For
    continual learning list the experts in the order in which they were trained.
    """

    name: ClassVar[str] = "magmax"
    paper: ClassVar[str] = (
        "Marczak et al. 2024, MagMax: leveraging model merging for seamless continual learning, arXiv:2407.06322"
    )
    published: ClassVar[tuple[str, ...]] = (
        "the authors' code, bit for bit in float32; its scripts take scale 0.5, some 0.55",
    )
    ordered: ClassVar[bool] = True

    scale: Annotated[Scale, Field(description="λ, the factor of the chosen changes")] = 0.5

    @classmethod
    def examples(cls) -> Examples:
        return Examples(golden=[{}, {"scale": {"first": 0.25, "last": 1.0}}], others=[{"scale": 1.0}])

    @property
    def idempotent(self) -> bool:
        return False

    def merge(self, base: Tensor, deltas: Sequence[Tensor], arguments: NoArguments) -> Tensor:
        """Return θ_0 + λ τ_t with t = argmax |τ_t|, the last of several, coordinate by coordinate."""
        chosen = deltas[0]
        for delta in deltas[1:]:
            chosen = torch.where(delta.abs() >= chosen.abs(), delta, chosen)
        return base + chosen * self.scale

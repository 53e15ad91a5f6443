"""NearSwap: towards an expert, but no weight further from the base than t (alchemonaut 2024; as mergekit's
`nearswap`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergecore.errors import SpecError
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import NoArguments, WeightMethod
from mergecore.plugins.per_expert import experts_given


class Nearswap(WeightMethod[NoArguments]):
    """Take the expert's weights where they differ from the base's by at most t. Elsewhere go from the base towards the
    expert by t.

    mergekit weighs the expert by min(1, t / |θ_1 − θ_0|), which is the same but needs a division. t = 0 gives the base
    and a large t the expert, bit for bit.
    """

    name: ClassVar[str] = "nearswap"
    paper: ClassVar[str] = "alchemonaut 2024, model card of QuartetAnemoi-70B-t0.0001"
    published: ClassVar[tuple[str, ...]] = ("mergekit's `nearswap`, without its floor of 1e-6 under |θ_1 − θ_0|",)

    t: Annotated[float, Field(ge=0, description=("how far a weight may go from the base, in the units of the weight"))]

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            golden=[{"t": 0.03125}],
            others=[{"t": 0.05}],
        )

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def idempotent(self) -> bool:
        return False

    def validate_count(self, count: int) -> None:
        if count != 1:
            raise SpecError(f"nearswap goes from the base towards one expert, {experts_given(count)}")

    def merge(self, weights: Sequence[Tensor], arguments: NoArguments) -> Tensor:
        """Return θ_1, but at least θ_0 − t and at most θ_0 + t."""
        base, expert = weights
        return torch.maximum(torch.minimum(expert, base + self.t), base - self.t)

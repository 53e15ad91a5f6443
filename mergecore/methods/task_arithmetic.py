"""Task arithmetic: θ = θ_0 + λ Σ_t τ_t (Ilharco et al. 2023, §2); with a drop, DARE (Yu et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from mergecore.method import Block, Method, Statistic, Statistics
from mergecore.statistics.dropped_norms import drawn_for, drop_statistics
from mergecore.trims import RandomDrop, dropped, folded_sum


class TaskArithmetic(Method):
    """The base plus the scaled sum of the task vectors; a negative scale forgets (negation)."""

    name: ClassVar[str] = "task_arithmetic"
    idempotent: ClassVar[bool] = False

    scale: Annotated[float, Field(description="λ, the factor of the summed task vectors; 1/T gives the average")]
    drop: Annotated[RandomDrop | None, Field(description="random drop of deltas before the sum (DARE)")] = None

    @property
    def on(self) -> str:
        """Deltas."""
        return "deltas"

    def statistics(self) -> Mapping[str, Statistic]:
        """The l1 factors of the drop, where it has them."""
        return drop_statistics(self.drop)

    def arguments(self, block: Block, statistics: Statistics) -> dict[str, Any]:
        """What the drop draws."""
        return {"drawn": drawn_for(self.drop, block, statistics)}

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], **arguments: Any) -> Tensor:
        """θ_0 + λ Σ τ_t, formed left over the experts."""
        assert base is not None
        return base + folded_sum(dropped(experts, arguments["drawn"])) * self.scale

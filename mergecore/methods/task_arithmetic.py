"""Task arithmetic: θ = θ_0 + λ Σ_t τ_t (Ilharco et al. 2023, §2); with a drop, DARE (Yu et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from mergecore.coefficients import Coefficients, check_coefficients, reordered
from mergecore.method import Block, Method, Statistic, Statistics
from mergecore.statistics.dropped_norms import drawn_for, drop_statistics
from mergecore.trims import RandomDrop, dropped, folded_sum


class TaskArithmetic(Method):
    """The base plus the scaled sum of the task vectors; a negative scale forgets (negation).

    With a scale per expert it is any arithmetic: `[λ, λ, −λ]` on experts C, B, A is the analogy C + (B − A).
    """

    name: ClassVar[str] = "task_arithmetic"
    paper: ClassVar[str] = (
        "Ilharco et al. 2023, Editing models with task arithmetic, arXiv:2212.04089; drop: Yu et al. "
        "2024, Language models are super Mario, arXiv:2311.03099"
    )
    published: ClassVar[tuple[str, ...]] = (
        "the authors' code, with integer buffers copied",
        "a list of scales mergekit's `task_arithmetic` with these weights",
        "`drop: {rescale: l1}` its `dare_linear`, of other random masks",
    )
    idempotent: ClassVar[bool] = False

    scale: Annotated[
        Coefficients,
        Field(
            description="λ, the factor of the summed task vectors (1/T gives the average), or one λ_t per expert in the "
            "order of the recipe"
        ),
    ]
    drop: Annotated[RandomDrop | None, Field(description="random drop of deltas before the sum (DARE)")] = None

    @property
    def on(self) -> str:
        """Deltas."""
        return "deltas"

    def validate_count(self, count: int) -> None:
        """One λ, or one per expert."""
        check_coefficients("scale", self.scale, count)

    def bound(self, order: Sequence[int]) -> TaskArithmetic:
        """Each λ_t moved along with its expert."""
        return self.model_copy(update={"scale": reordered(self.scale, order)})

    def statistics(self) -> Mapping[str, Statistic]:
        """The l1 factors of the drop, where it has them."""
        return drop_statistics(self.drop)

    def arguments(self, block: Block, statistics: Statistics) -> dict[str, Any]:
        """What the drop draws."""
        return {"drawn": drawn_for(self.drop, block, statistics)}

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], **arguments: Any) -> Tensor:
        """θ_0 + λ Σ τ_t, or θ_0 + Σ λ_t τ_t, formed left over the experts."""
        assert base is not None
        deltas = dropped(experts, arguments["drawn"])
        if isinstance(self.scale, tuple):
            return base + folded_sum([delta * scale for delta, scale in zip(deltas, self.scale, strict=True)])
        return base + folded_sum(deltas) * self.scale

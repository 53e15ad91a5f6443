"""Averaging: θ = Σ w_t θ_t / Σ w_t. Model soups (Wortsman et al. 2022, §2); with a drop, DARE before an average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from mergecore.method import Block, Method, Statistic, Statistics, check_weights, moved
from mergecore.statistics.dropped_norms import drawn_for, drop_statistics
from mergecore.trims import RandomDrop, divided, dropped, folded_sum


class Average(Method):
    """The (weighted) mean of the experts' weights. The base is used only where a drop needs deltas."""

    name: ClassVar[str] = "average"
    paper: ClassVar[str] = (
        "Wortsman et al. 2022, Model soups: averaging weights of multiple fine-tuned models improves "
        "accuracy without increasing inference time, arXiv:2203.05482; drop: Yu et al. 2024, "
        "arXiv:2311.03099"
    )
    published: ClassVar[tuple[str, ...]] = ("mergekit's `linear` (float32 sums instead of the checkpoint's dtype)",)

    weights: Annotated[
        tuple[Annotated[float, Field(ge=0)], ...] | None,
        Field(description="one weight ≥ 0 per expert, in the order of the recipe; divided by their sum; none: uniform"),
    ] = None
    drop: Annotated[RandomDrop | None, Field(description="random drop of deltas before the mean (DARE)")] = None

    @property
    def on(self) -> str:
        """Weights; deltas where there is a drop."""
        return "weights" if self.drop is None else "deltas"

    def statistics(self) -> Mapping[str, Statistic]:
        """The l1 factors of the drop, where it has them."""
        return drop_statistics(self.drop)

    def validate_count(self, count: int) -> None:
        """One weight per expert, not all zero."""
        check_weights(self.weights, count)

    def bound(self, order: Sequence[int]) -> Average:
        """Weights moved along with their experts."""
        return self if self.weights is None else self.model_copy(update={"weights": moved(self.weights, order)})

    def arguments(self, block: Block, statistics: Statistics) -> dict[str, Any]:
        """What the drop draws."""
        return {"drawn": drawn_for(self.drop, block, statistics)}

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], **arguments: Any) -> Tensor:
        """Σ w_t x_t / Σ w_t, of weights, or of dropped deltas and then added to the base."""
        values = dropped(experts, arguments["drawn"])
        if self.weights is None:
            mean = divided(folded_sum(values), len(values))
        else:
            mean = folded_sum([value * weight for value, weight in zip(values, self.weights, strict=True)])
            mean = divided(mean, fsum(self.weights))
        return mean if self.drop is None or base is None else base + mean

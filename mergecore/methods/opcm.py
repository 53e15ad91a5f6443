"""OPCM: experts arrive one by one, each projected off what is merged already (Tang et al. 2025, arXiv 2501.09522)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from mergecore.arithmetic.linear_algebra import Excluded
from mergecore.checkpoints.architectures import EMBEDDINGS
from mergecore.errors import SpecError
from mergecore.identity.keys import digest
from mergecore.plugins.block import Beside, Block
from mergecore.plugins.chain import Link
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import Method
from mergecore.plugins.statistic import Statistics
from mergecore.statistics.projected_sum import ProjectedSum, Projection, Share, merged_factor


class Shuffled(BaseModel):
    """Experts by hash(seed, weights digest): an order of its own for every seed, whatever the recipe's."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    seed: Annotated[int, Field(ge=0, description="another seed, another order")]


class Opcm(Method):
    """The base plus a sum of task vectors, each orthogonal to those before it, scaled to the mean of their norms."""

    name: ClassVar[str] = "opcm"
    paper: ClassVar[str] = (
        "Tang et al. 2025, Merging models on the fly without retraining: a sequential approach to scalable continual model "
        "merging, arXiv:2501.09522"
    )
    published: ClassVar[tuple[str, ...]] = (
        "the authors' code",
        "`projection: strict` the sum as the paper prints it",
    )
    ordered: ClassVar[bool] = True
    idempotent: ClassVar[bool] = False

    share: Share = 0.5
    projection: Projection = "block"
    order: Annotated[
        Literal["recipe"] | tuple[Annotated[int, Field(ge=0)], ...] | Shuffled,
        Field(
            description="who arrives when: 'recipe' as the experts are listed, a list of positions counted from 0, or "
            "{seed: n} for an order by chance; a grid of seeds tries several"
        ),
    ] = "recipe"
    excluded: Excluded = EMBEDDINGS

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            golden=[{}, {"share": 1.0, "projection": "strict", "order": [2, 0, 1]}],
            others=[{"share": 1.0, "projection": "strict", "order": [2, 0, 1], "excluded": ["*.m"]}],
        )

    @property
    def on(self) -> str:
        """The state: the chain holds all of the experts that counts."""
        return "state"

    @property
    def needs_base(self) -> bool:
        """Task vectors start from it."""
        return True

    @property
    def needs_ids(self) -> bool:
        """An order by chance is drawn by expert id."""
        return isinstance(self.order, Shuffled)

    def statistics(self) -> Mapping[str, Link]:
        """The sum so far, a chain with one link for each expert."""
        return {"sum": ProjectedSum(share=self.share, projection=self.projection, excluded=self.excluded)}

    def validate_count(self, count: int) -> None:
        """Raise SpecError where the order is no order of `count` experts."""
        if isinstance(self.order, tuple) and sorted(self.order) != list(range(count)):
            raise SpecError(
                f"opcm: order {list(self.order)} is no order of {count} experts; name each of the positions 0 to "
                f"{count - 1} once, or give {{seed: n}}"
            )

    def arranged(self, ids: Sequence[str]) -> list[int]:
        """The positions in the order of arrival."""
        if isinstance(self.order, tuple):
            return list(self.order)
        positions = list(range(len(ids)))
        if isinstance(self.order, Shuffled):
            seed = self.order.seed
            positions.sort(key=lambda position: digest([seed, ids[position]]))
        return positions

    def bound(self, order: Sequence[int]) -> Method:
        """The same without its order, which is now that of the experts: however an order is said, it is one step."""
        return self.model_copy(update={"order": "recipe"})

    def arguments(self, block: Block, statistics: Statistics) -> dict[str, Any]:
        """The sum's elements and its factor."""
        found = statistics["sum"][0]
        return {"change": Beside(found.tensors, block.name), "factor": merged_factor(found)}

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], **arguments: Any) -> Tensor:
        """θ_0 + S_T · mean ‖τ‖ / ‖S_T‖."""
        assert base is not None
        change: Tensor = arguments["change"]
        factor: float = arguments["factor"]
        return base + change * factor

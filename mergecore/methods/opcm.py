"""OPCM: experts arrive one by one, each projected off what is merged already (Tang et al. 2025, arXiv 2501.09522)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field
from torch import Tensor

from mergecore.arithmetic.linear_algebra import Excluded, Stacks, keyed, stacks_among
from mergecore.checkpoints.architectures import EMBEDDINGS
from mergecore.errors import SpecError
from mergecore.identity.keys import digest
from mergecore.identity.numbers import Numbers
from mergecore.plugins.block import Block, read_beside
from mergecore.plugins.chain import Link
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import Method, On
from mergecore.plugins.statistic import Statistics
from mergecore.statistics.projected_sum import ProjectedSum, Projection, Share, merged_factor
from mergecore.tensors.source import TensorInfo


class Shuffled(Numbers):
    """Experts by hash(seed, weights digest): an order of its own for every seed, whatever the recipe's."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    seed: Annotated[int, Field(ge=0, description="seed of the random order")]


@dataclass(frozen=True)
class OpcmArguments:
    """change: the elements of the chain's sum S_T. factor: mean ‖τ‖ / ‖S_T‖."""

    change: Tensor
    factor: float


class Opcm(Method[OpcmArguments]):
    """Add the experts one after another. Of each task vector only the part counts that is orthogonal to the sum so far.

    The sum is scaled to the mean of the task vectors' norms.
    """

    name: ClassVar[str] = "opcm"
    paper: ClassVar[str] = (
        "Tang et al. 2025, Merging models on the fly without retraining: a sequential approach to scalable continual "
        "model merging, arXiv:2501.09522"
    )
    published: ClassVar[tuple[str, ...]] = (
        "the authors' code",
        "`projection: strict` the sum as the paper prints it",
    )
    ordered: ClassVar[bool] = True

    share: Share = 0.5
    projection: Projection = "block"
    order: Annotated[
        Literal["recipe"] | tuple[Annotated[int, Field(ge=0)], ...] | Shuffled,
        Field(
            description=(
                "the order of the experts: 'recipe', as they are listed; a list of positions, counted "
                "from 0; or {seed: n}, a random order. A grid of seeds tries several orders"
            )
        ),
    ] = "recipe"
    excluded: Excluded = EMBEDDINGS
    stacks: Stacks = None

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            golden=[{}, {"share": 1.0, "projection": "strict", "order": [2, 0, 1]}],
            others=[{"share": 1.0, "projection": "strict", "order": [2, 0, 1], "excluded": ["*.m"]}],
        )

    @property
    def on(self) -> On:
        return "state"

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def needs_ids(self) -> bool:
        return isinstance(self.order, Shuffled)

    @property
    def idempotent(self) -> bool:
        return False

    def statistics(self) -> Mapping[str, Link]:
        chain = ProjectedSum(share=self.share, projection=self.projection, excluded=self.excluded, stacks=self.stacks)
        return {"sum": chain}

    def parameters(self) -> dict[str, Any]:
        """Return the fields as plain JSON. Without stacks in the model there is no key for them."""
        return keyed(super().parameters())

    def fitted(self, tensors: Mapping[str, TensorInfo]) -> Method[OpcmArguments]:
        """Return the method with the patterns under which the base has stacks of matrices."""
        return super().fitted(tensors).model_copy(update={"stacks": stacks_among(tensors, self.stacks)})

    def validate_count(self, count: int) -> None:
        if isinstance(self.order, tuple) and sorted(self.order) != list(range(count)):
            raise SpecError(
                f"opcm: order {list(self.order)} is no order of {count} experts; name each of the positions 0 to "
                f"{count - 1} once, or give {{seed: n}}"
            )

    def arranged(self, ids: Sequence[str]) -> list[int]:
        """Return the positions in the order of arrival."""
        if isinstance(self.order, tuple):
            return list(self.order)
        positions = list(range(len(ids)))
        if isinstance(self.order, Shuffled):
            seed = self.order.seed
            positions.sort(key=lambda position: digest([seed, ids[position]]))
        return positions

    def bound(self, order: Sequence[int]) -> Opcm:
        """Return the method without its order, which is now that of the experts: one step, however the order is
        written."""
        return self.model_copy(update={"order": "recipe"})

    def arguments(self, block: Block, statistics: Statistics) -> OpcmArguments:
        chain = statistics["sum"][0]
        return OpcmArguments(read_beside(chain.tensors, block.name), merged_factor(chain))

    def merge_models(self, models: Sequence[Tensor], arguments: OpcmArguments) -> Tensor:
        """Return θ_0 + S_T · mean ‖τ‖ / ‖S_T‖."""
        return models[0] + arguments.change * arguments.factor

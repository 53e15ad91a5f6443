"""The factor per tensor that gives a randomly dropped delta its l1 norm back (mergekit's DARE rescale)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mergecore.arithmetic.trims import Drawn, RandomDrop, dropped
from mergecore.plugins.block import Block
from mergecore.plugins.statistic import Result, Scope, Statistic, Statistics, Sums
from mergecore.statistics.block_sums import BlockSums, State, folded
from mergecore.tensors.source import TensorInfo


class DroppedNorms(BlockSums):
    """factor[tensor] = ‖τ‖₁ / ‖τ after the drop‖₁ (1 where nothing is left), float64 sums over the fixed grid."""

    name: ClassVar[str] = "dropped_norms"
    version: ClassVar[int] = 2
    scope: ClassVar[Scope] = Scope.EXPERT
    whole: ClassVar[bool] = True

    drop: RandomDrop

    def of_expert(self, position: int) -> DroppedNorms:
        """Return the statistic with the expert's own rate."""
        own = self.drop.of_expert(position)
        return self if own is self.drop else self.model_copy(update={"drop": own})

    def look(self, state: Any, block: Block, statistics: Statistics) -> Sums:
        """Add up both l1 norms."""
        return Sums(_magnitudes, {"drawn": self.drop.drawn(block, [1.0])}, 2)

    def finish(self, state: State, selection: Mapping[str, TensorInfo], statistics: Statistics) -> Result:
        """Return the numbers {'factor': {tensor: ratio}}."""
        factor: dict[str, Any] = {name: whole / left if left else 1.0 for name, (whole, left) in folded(state).items()}
        return Result({}, {"factor": factor})


def _magnitudes(experts: Sequence[Tensor], drawn: Drawn) -> list[Tensor]:
    magnitude = experts[0].abs()
    return [magnitude, *dropped([magnitude], drawn)]


@dataclass(frozen=True)
class DropArguments:
    """drawn: what the drop draws; None: there is none."""

    drawn: Drawn | None


def drawn_for(drop: RandomDrop | None, block: Block, statistics: Statistics) -> Drawn | None:
    """Return what `trims.dropped` needs for a block, with l1 factors where the drop rescales by them; None: no drop."""
    if drop is None:
        return None
    if drop.rescale != "l1":
        return drop.drawn(block, None)
    return drop.drawn(block, [float(norms.numbers["factor"].get(block.name, 1.0)) for norms in statistics["drop"]])


def drop_statistics(drop: RandomDrop | None) -> dict[str, Statistic]:
    """Return what a drop must know beforehand."""
    return {"drop": DroppedNorms(drop=drop)} if drop is not None and drop.rescale == "l1" else {}

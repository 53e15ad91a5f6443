"""The multi-task vector of several experts, and which of its coordinates a task wants (Wang et al. 2024, §3–4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.trims import agreeing, elected_sign, folded_sum
from mergecore.plugins.block import Block
from mergecore.plugins.statistic import Statistic, Statistics
from mergecore.statistics.sign_majority import SignMajority
from mergecore.statistics.threshold import Threshold, Trims, trimmed_deltas, trims

DENSITY = 0.2
"""The share that the authors let TIES keep."""

MultiTask = Annotated[
    Literal["sum", "ties", "ties_published"],
    Field(
        description="τ_m: 'sum' of task vectors; 'ties': trimmed model-wide, sign elected, those that agree summed; "
        "'ties_published': the same as the authors' code trims and settles exact cancellations"
    ),
]
TrimDensity = Annotated[
    float | None, Field(ge=0, le=1, description="share of each task vector that TIES keeps; none: 0.2")
]
MaskScale = Annotated[
    tuple[Annotated[float, Field(ge=0)], ...] | Annotated[float, Field(ge=0)],
    Field(description="λ, or one λ_t per expert in the order of the recipe; larger: sparser masks"),
]


@dataclass(frozen=True)
class MultiTaskArguments:
    """What `multi_task_vector` needs for one block.

    trims: for TIES, where each expert is cut; None: τ_m is the sum. zero: the sign where the trimmed values cancel
    exactly.
    """

    trims: Trims | None = None
    zero: float | None = None


@dataclass(frozen=True)
class MultiTaskRule:
    """How τ_m is formed: see `MultiTask` and `TrimDensity`."""

    kind: Literal["sum", "ties", "ties_published"]
    density: float | None

    def check(self) -> None:
        """Raise ValueError where a density is set that nothing uses."""
        if self.kind == "sum" and self.density is not None:
            raise ValueError("density is what 'ties' keeps: leave it out with multi_task 'sum'")

    @property
    def threshold(self) -> Threshold:
        """The trim as a statistic."""
        kept = DENSITY if self.density is None else self.density
        return Threshold(density=kept, count="published" if self.kind == "ties_published" else "at_least")

    def statistics(self) -> dict[str, Statistic]:
        """Return nothing for the sum; for TIES each expert's threshold, and the majority sign where it decides."""
        if self.kind == "sum":
            return {}
        majority = {"majority": SignMajority(threshold=self.threshold)} if self.kind == "ties_published" else {}
        return {"threshold": self.threshold, **majority}

    def arguments(self, block: Block, statistics: Statistics) -> MultiTaskArguments:
        """Return what `multi_task_vector` needs for a block."""
        if self.kind == "sum":
            return MultiTaskArguments()
        # A majority of 0 leaves the sign at 0, and the authors' selector then takes the negatives (specs §4d).
        zero = float(statistics["majority"][0].numbers["sign"]) or -1.0 if "majority" in statistics else None
        return MultiTaskArguments(trims(self.threshold, block, statistics), zero)


def multi_task_vector(deltas: Sequence[Tensor], arguments: MultiTaskArguments) -> Tensor:
    """Return τ_m of one block, from the experts' τ_t."""
    if arguments.trims is None:
        return folded_sum(deltas)
    trimmed = trimmed_deltas(deltas, arguments.trims)
    return folded_sum(agreeing(trimmed, elected_sign(trimmed, arguments.zero)))


def task_masks(deltas: Sequence[Tensor], together: Tensor, scales: Sequence[float]) -> list[Tensor]:
    """Return M_t = |τ_t| > λ_t |τ_m − τ_t|, strictly as in the authors' code: what nobody changes is in no mask."""
    return [delta.abs() > (together - delta).abs() * scale for delta, scale in zip(deltas, scales, strict=True)]

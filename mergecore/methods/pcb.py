"""PCB-Merging: task vectors weighted, coordinate by coordinate, by their balanced scores (Du et al. 2024, §3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mergecore.arithmetic.trims import divided, folded_sum
from mergecore.plugins.block import Block
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import DeltaMethod
from mergecore.plugins.per_expert import EACH, ONE, ONE_OR_EACH, check_each, each, moved
from mergecore.plugins.statistic import Statistic, Statistics
from mergecore.statistics.balance_cut import BalanceCut
from mergecore.statistics.balance_scores import Balancing, Form, balancing, scores

Coefficients = Annotated[Annotated[float, ONE] | Annotated[tuple[float, ...], EACH], ONE_OR_EACH]
CLIP = 0.01
"""What the authors' code clips at either end (pcb-merging.py: 0.0001)."""
LEAST = 1e-12
"""Smallest sum of weights that is divided by, as in the authors' code."""


@dataclass(frozen=True)
class Cut:
    """Between which scores β one expert's weights run from 0 to 1; width: high − low, None where they are equal."""

    low: float
    high: float
    width: float | None


@dataclass(frozen=True)
class PcbArguments:
    """balancing: what scores are normalised by. cuts: one per expert."""

    balancing: Balancing
    cuts: Sequence[Cut]


class Pcb(DeltaMethod[PcbArguments]):
    """Score every coordinate of every expert, drop the low scores, and average the rest by score.

    Where a single expert keeps a coordinate, the result is that expert's full change: the drop decides, and the score
    only weighs the experts that are left. All forms but 'paper' clip magnitudes first, and weigh by scores that are
    scaled to 0 at the cut. Where the scaling would divide 0 by 0, all coordinates count the same; those of an all-zero
    task vector count as absent. exp and tanh are the project's own, so results are the same on every device.
    """

    name: ClassVar[str] = "pcb"
    paper: ClassVar[str] = "Du et al. 2024, Parameter competition balancing for model merging, arXiv:2410.02396"
    published: ClassVar[tuple[str, ...]] = (
        "`form: es`, `vision`, `nlp` the authors' three scripts, of which es is nearest to the paper",
    )

    density: Annotated[float, Field(gt=0, le=1, description="r, the share of each expert's scores that survives")] = 0.2
    scale: Annotated[Coefficients, Field(description="λ, or one λ_i per expert in the order of the recipe")] = 1.0
    form: Annotated[
        Form,
        Field(
            description=(
                "how scores are formed: 'es', 'vision' and 'nlp' as in the authors' scripts of these "
                "names, 'paper' by the printed formula; 'es' is nearest to the paper"
            )
        ),
    ] = "es"
    clip: Annotated[
        float | None,
        Field(ge=0, lt=0.5, description=("share at either end at which |τ| is clipped; none: 0.01, for 'paper' 0")),
    ] = None

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            golden=[
                {"form": "es", "clip": 0.05},
                {"form": "vision", "clip": 0},
                {"form": "nlp", "clip": 0.01},
                {"form": "paper", "clip": None},
            ],
            others=[
                *({"form": form, "density": 0.3, "scale": 1.2} for form in ("es", "vision", "nlp", "paper")),
                {"scale": [1.3, 0.8, 1], "clip": 0.2},
            ],
        )

    @model_validator(mode="after")
    def _paper_does_not_clip(self) -> Pcb:
        if self.form == "paper" and self.clip:
            raise ValueError("form 'paper' does not clip: leave clip out")
        return self

    def revision(self, count: int) -> int:
        return self.version + (not any(each(self.scale, count)))

    @property
    def idempotent(self) -> bool:
        return False

    @property
    def cut(self) -> BalanceCut:
        """The drop as a statistic."""
        default = 0.0 if self.form == "paper" else CLIP
        return BalanceCut(form=self.form, density=self.density, clip=default if self.clip is None else self.clip)

    def statistics(self) -> Mapping[str, Statistic]:
        return {**self.cut.statistics(), "cut": self.cut}

    def validate_count(self, count: int) -> None:
        check_each("scale", self.scale, count)

    def bound(self, order: Sequence[int]) -> Pcb:
        return self.model_copy(update={"scale": moved(self.scale, order)})

    def arguments(self, block: Block, statistics: Statistics) -> PcbArguments:
        numbers = statistics["cut"][0].numbers
        cuts = [
            Cut(low, high, high - low if high > low else None)
            for low, high in zip(numbers["low"], numbers["high"], strict=True)
        ]
        return PcbArguments(balancing(self.form, len(block.ids), statistics), cuts)

    def _weight(self, score: Tensor, cut: Cut) -> Tensor:
        """Return w of one expert: β where it survives (paper), or min–max of β clipped at the cut."""
        if self.form == "paper":
            return torch.where(score >= cut.low, score, 0.0)
        if cut.width is None:
            return torch.where((score >= cut.high) & (score > 0), 1.0, 0.0)
        return divided(score.clamp(cut.low, cut.high) - cut.low, cut.width)

    def merge(self, base: Tensor, deltas: Sequence[Tensor], arguments: PcbArguments) -> Tensor:
        """Return θ_0 + Σ_i λ_i w_i τ_i / Σ_i w_i, of task vectors clipped (but for 'paper')."""
        if not any(each(self.scale, len(deltas))):
            return base
        scored = zip(scores(deltas, arguments.balancing), arguments.cuts, strict=True)
        weights = [self._weight(score, cut) for score, cut in scored]
        clipped = deltas
        if self.form != "paper":
            clipped = [
                torch.sign(delta) * delta.abs().clamp(ends.low, ends.high)
                for delta, ends in zip(deltas, arguments.balancing.ends, strict=True)
            ]
        scales = each(self.scale, len(deltas))
        total = folded_sum([w * (delta * scale) for w, delta, scale in zip(weights, clipped, scales, strict=True)])
        return base + total / folded_sum(weights).clamp(min=LEAST)

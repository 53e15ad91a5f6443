"""Greedy soup: experts join in the order of their own scores as long as the merge gets no worse (Wortsman et al. 2022,
§2).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mergecore.errors import SpecError
from mergecore.plugins.search import Ask, Ground, Rounds, Search


class Greedy(Search):
    """Which experts are merged: each alone, then one more at a time from the best on; what joins stays.

    The method is the entry's: by `average` it is the published greedy soup. The result scores at least what the best
    single expert scores. Experts that score alike are taken by ascending id.
    """

    name: ClassVar[str] = "greedy"
    accept: Annotated[
        Literal["at_least", "above"],
        Field(
            description="who joins: 'at_least', whoever does not lower the score (the paper's recipe), or 'above', "
            "only "
            "who raises it (the authors' code)"
        ),
    ] = "at_least"

    def rounds(self, ground: Ground) -> Rounds:
        """All experts alone in one round, then a round for each that may join."""
        alone = tuple(ground.candidate([expert], {}) for expert in ground.experts)
        scores = yield Ask(alone)
        means = {expert: score.mean for expert, score in zip(ground.experts, scores, strict=True) if score is not None}
        order = sorted(means, key=lambda expert: (-means[expert], ground.ids[expert]))
        if not order:
            return None
        soup, best = [order[0]], means[order[0]]
        for expert in order[1:]:
            candidate = ground.candidate([*soup, expert], {})
            (score,) = yield Ask((candidate,), ground.candidate(soup, {}))
            if score is not None and (score.mean > best or (score.mean == best and self.accept == "at_least")):
                soup, best = [*soup, expert], score.mean
        return ground.candidate(soup, {})

    def most(self, ground: Ground) -> int:
        """T alone and T − 1 soups."""
        return 2 * len(ground.ids) - 1

    def check(self, ground: Ground) -> None:
        """A soup of one expert is that expert."""
        if len(ground.ids) < 2:
            raise SpecError("a greedy search over one expert has nothing to choose; give counts of 2 and more")

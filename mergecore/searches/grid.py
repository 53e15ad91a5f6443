"""Values from a list, measured in one round: one choice for the whole merge, or one for each expert on its own
tasks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from statistics import fmean
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator

from mergecore.errors import SpecError
from mergecore.identity.numbers import Numbers
from mergecore.plugins.search import Ask, Candidate, Ground, Rounds, Score, Search

Combination = Mapping[str, float]
MOST_COMBINATIONS = 10_000
"""More are no list that anybody measures."""


class Listed(Numbers):
    """A parameter and the values that it may have."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    parameter: str = Field(description="a number of the method, as in scale or drop.rate")
    values: tuple[int | float, ...] = Field(min_length=1, description="values to try; of equals the first one wins")


class Grid(Search):
    """Which of the listed values: all combinations are made in one pass and measured side by side.

    choose 'for_each' is how TALL masks get their λ_t (Wang et al. 2024, §3): every expert takes the values that are
    best on its own tasks, and the merge with all of these is measured in a second round; where that is worse than the
    best choice for all (it cannot be, where a task's model depends on its own λ_t alone), the latter is the result.
    """

    name: ClassVar[str] = "grid"
    over: Annotated[tuple[Listed, ...], Field(min_length=1, description="parameters and their values")]
    choose: Annotated[
        Literal["for_all", "for_each"],
        Field(description="one choice for the whole merge, or one for each expert by the scores of its own tasks"),
    ] = "for_all"

    @field_validator("over")
    @classmethod
    def _each_once(cls, over: tuple[Listed, ...]) -> tuple[Listed, ...]:
        count = prod(len(axis.values) for axis in over)
        if count > MOST_COMBINATIONS:
            raise ValueError(
                f"{count:,} combinations, more than {MOST_COMBINATIONS:,}: list fewer values, or take `by: nevergrad`"
            )
        return each_once(over)

    @property
    def by_own_tasks(self) -> bool:
        """To choose for each expert."""
        return self.choose == "for_each"

    @property
    def combinations(self) -> list[Combination]:
        """Every combination, in the order written."""
        names = [axis.parameter for axis in self.over]
        return [
            dict(zip(names, values, strict=True)) for values in itertools.product(*(axis.values for axis in self.over))
        ]

    def rounds(self, ground: Ground) -> Rounds:
        """Every combination; then, with 'for_each', the merge in which each expert has its own."""
        combinations = self.combinations
        asked = tuple(ground.candidate(ground.experts, values) for values in combinations)
        scores = yield Ask(asked)
        known_scores = [score for score in scores if score is not None]
        if not known_scores:
            return None
        best = max(known_scores, key=lambda score: score.mean)
        best_values = asked[next(place for place, score in enumerate(scores) if score is best)]
        mixed = (
            self._mixed(ground, dict(best_values.values), combinations, scores) if self.choose == "for_each" else None
        )
        if mixed is None:
            return best_values
        (score,) = yield Ask((mixed,), best_values)
        return mixed if score is not None and score.mean >= best.mean else best_values

    def _mixed(
        self,
        ground: Ground,
        for_all: Combination,
        combinations: Sequence[Combination],
        scores: Sequence[Score | None],
    ) -> Candidate | None:
        """Each expert with the values best on its own tasks, of equals those best for all; None where nobody
        differs.
        """
        known = [(values, score) for values, score in zip(combinations, scores, strict=True) if score is not None]
        known.sort(key=lambda pair: pair[0] != for_all)
        chosen = [
            max(known, key=lambda pair, own=ground.own[expert]: fmean(pair[1].tasks[task] for task in own))[0]  # type: ignore[misc]
            for expert in ground.experts
        ]
        if all(values == for_all for values in chosen):
            return None
        return ground.candidate(ground.experts, {name: tuple(values[name] for values in chosen) for name in chosen[0]})

    def most(self, ground: Ground) -> int:
        """All combinations, and the one made of them."""
        return len(self.combinations) + (self.choose == "for_each")

    def trials(self) -> Iterator[Mapping[str, Any]]:
        """Every combination, for one expert where each has its own."""
        yield from self.combinations
        if self.choose == "for_each":
            yield {axis.parameter: axis.values[:1] for axis in self.over}

    def check(self, ground: Ground) -> None:
        """To choose for each expert it must be known what it was trained for."""
        strange = [expert for expert in ground.experts if not ground.own[expert]]
        if self.choose == "for_each" and strange:
            raise SpecError(
                f"a value is chosen for each expert on its own tasks, and '{strange[0]}' has none; name them "
                "(experts: [{name: …, tasks: […]}]), or choose for_all"
            )


def each_once(over: tuple[Any, ...]) -> tuple[Any, ...]:
    """The parameters as they are. Raises ValueError where one stands twice."""
    names = [range_of.parameter for range_of in over]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"'{twice}' stands there twice; list each parameter once")
    return over

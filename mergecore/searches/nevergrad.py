"""Numbers found by an optimiser that sees nothing but scores: nevergrad's, as PCB-Merging uses it (Du et al. 2024,
§3.3).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from mergecore.errors import EvaluationError, SpecError
from mergecore.identity.numbers import Numbers
from mergecore.plugins.search import Ask, Candidate, Ground, Rounds, Search
from mergecore.searches.grid import each_once

OPTIMIZERS = {"cma": "CMA", "one_plus_one": "OnePlusOne", "two_points_de": "TwoPointsDE", "ngopt": "NGOpt"}
"""What a spec writes, and nevergrad's names."""
DIGITS = 6
"""Significant digits of a proposal: a last bit that differs between machines then makes no other model."""


class Between(Numbers):
    """A parameter and the bounds that it is searched in."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    parameter: str = Field(description="a number of the method, as in scale or drop.rate")
    low: float = Field(description="lower bound; may be reached")
    high: float = Field(description="upper bound; may be reached")
    start: float | None = Field(None, description="what is tried first; none: the middle")
    per: Literal["merge", "expert"] = Field("merge", description="one number for the merge, or one for each expert")
    numbers: Literal["real", "whole"] = Field("real", description="whole numbers are rounded to")

    @model_validator(mode="after")
    def _in_order(self) -> Between:
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        if not self.low <= self.first <= self.high:
            raise ValueError(f"start {self.first:g} must lie between low {self.low:g} and high {self.high:g}")
        return self

    @property
    def first(self) -> float:
        """What is tried first."""
        return (self.low + self.high) / 2 if self.start is None else self.start

    def written(self, value: float) -> float:
        """A number as it enters the merge."""
        within = min(max(value, self.low), self.high)
        return round(within) if self.numbers == "whole" else float(f"{within:.{DIGITS}g}")


class Nevergrad(Search):
    """Which numbers within bounds, by an optimiser that is told scores and asked for more.

    What is tried first are the starting values, so that the result is never worse than they are. A candidate that fails
    is told to the optimiser as the worst so far. Equal proposals cost nothing but their place in the budget.
    """

    name: ClassVar[str] = "nevergrad"
    over: Annotated[tuple[Between, ...], Field(min_length=1, description="parameters and their bounds")]
    budget: Annotated[
        int, Field(ge=1, le=1_000_000, description="how many proposals, the starting values included")
    ] = 100
    seed: Annotated[int, Field(ge=0, lt=2**32, description="of the optimiser's own draws")] = 0
    at_once: Annotated[
        int,
        Field(
            ge=1,
            le=10_000,
            description="proposals in a round: made in one pass, measured side by side; changes what is found",
        ),
    ] = 1
    optimizer: Annotated[
        Literal["cma", "one_plus_one", "two_points_de", "ngopt"],
        Field(
            description="nevergrad's optimiser; 'ngopt', PCB's, picks one itself and is refused where that one cannot "
            "be replayed"
        ),
    ] = "cma"  # fmt: skip

    @field_validator("over")
    @classmethod
    def _each_once(cls, over: tuple[Between, ...]) -> tuple[Between, ...]:
        return each_once(over)

    def rounds(self, ground: Ground) -> Rounds:
        """The starting values, then what the optimiser proposes."""
        optimizer = self._optimizer(len(ground.ids))
        best = self._candidate(ground, [axis.first for axis in self._places(len(ground.ids))])
        heard: list[float] = []
        left, first = self.budget, [best]
        while left > 0:
            with self._going_on():
                asked = [optimizer.ask() for _ in range(min(self.at_once, left) - len(first))]
            batch = (*first, *(self._candidate(ground, list(proposal.value)) for proposal in asked))
            scores = yield Ask(batch, best if heard else None)
            for candidate, score in zip(batch, scores, strict=True):
                if score is not None:
                    best = candidate if not heard or score.mean > max(heard) else best
                    heard.append(score.mean)
            with self._going_on():
                for proposal, score in zip(asked, scores[len(first) :], strict=True):
                    optimizer.tell(proposal, -(min(heard, default=0.0) if score is None else score.mean))
            left, first = left - len(batch), []
        return best if heard else None

    def _places(self, count: int) -> list[Between]:
        """The range of each number that is searched."""
        return [axis for axis in self.over for _ in range(count if axis.per == "expert" else 1)]

    def _candidate(self, ground: Ground, point: list[float]) -> Candidate:
        values: dict[str, Any] = {}
        left = iter(point)
        for axis in self.over:
            if axis.per == "expert":
                values[axis.parameter] = tuple(axis.written(float(next(left))) for _ in ground.ids)
            else:
                values[axis.parameter] = axis.written(float(next(left)))
        return ground.candidate(ground.experts, values)

    def _optimizer(self, count: int) -> Any:
        """nevergrad's optimiser over one array, seeded. Raises SpecError where it is not installed or cannot be
        replayed.
        """
        try:
            import nevergrad
        except ImportError as error:
            raise SpecError(
                f"a search by nevergrad needs that package ({error}); install it with: pip install 'mergeloom[search]'"
            ) from None
        places = self._places(count)
        ends = {"lower": [axis.low for axis in places], "upper": [axis.high for axis in places]}
        space = nevergrad.p.Array(init=[axis.first for axis in places], **ends)
        space.random_state.seed(self.seed)
        kind = nevergrad.optimizers.registry[OPTIMIZERS[self.optimizer]]
        optimizer = kind(parametrization=space, budget=self.budget, num_workers=self.at_once)
        inner = optimizer
        while hasattr(inner, "optim"):
            inner = inner.optim
        picked = type(inner).__name__.strip("_")
        if "MetaModel" in picked:  # it draws from the clock
            raise SpecError(
                f"optimizer 'ngopt' picks {picked} for {len(places)} numbers and a budget of {self.budget}, which does "
                "not "
                "propose the same twice, so that a search could not be resumed; take 'cma', or another budget"
            )
        return optimizer

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """Around what the optimiser does: its errors are ours, and its warnings (about tolerances nobody set)
        nobody's.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                yield
            except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
                raise EvaluationError(
                    f"nevergrad's optimiser '{self.optimizer}' cannot go on ({type(error).__name__}: {error}); the "
                    "best "
                    "so far holds; another `optimizer` may do better"
                ) from error

    def most(self, ground: Ground) -> int:
        """The budget."""
        return self.budget

    def trials(self) -> Iterator[Mapping[str, Any]]:
        """Both ends of every range."""
        for end in ("low", "high"):
            ends = {axis.parameter: (axis, axis.written(getattr(axis, end))) for axis in self.over}
            yield {name: (value,) if axis.per == "expert" else value for name, (axis, value) in ends.items()}

    def check(self, ground: Ground) -> None:
        """The package must be there, and what 'ngopt' picks must be one that can be replayed."""
        self._optimizer(len(ground.ids))

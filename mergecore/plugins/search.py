"""Searches: plans that grow. A search asks for the scores of merges on validation items, is sent them, and goes on.

A search is a generator. It yields rounds of candidates, is sent their scores, and returns its result. It knows no store
and no clock, and draws from its seed alone. So equal scores lead to equal proposals: a search that was killed is played
again from the recorded scores, and goes on where it was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from mergecore.plugins.plugin import Plugin


@dataclass(frozen=True)
class Candidate:
    """A merge that a search wants measured.

    experts: names, in the order of the spec. values: (path, value) of the parameters that differ from the spec's entry,
    as
    in ('drop.rate', 0.5). One value per expert stands in the order of `experts`.
    """

    experts: tuple[str, ...]
    values: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Score:
    """The score of a candidate on validation items; higher is better. mean: what the search decides by."""

    mean: float
    tasks: Mapping[str, float]


@dataclass(frozen=True)
class NoScore:
    """Why a candidate could not be measured: it was refused, or a step of it failed."""

    reason: str


Answer = Score | NoScore | None
"""What is known of a candidate; None while it is being made or measured."""


@dataclass(frozen=True)
class Ask:
    """One round: candidates to measure side by side, and the best so far, which is kept meanwhile."""

    candidates: tuple[Candidate, ...]
    best: Candidate | None = None


Rounds = Generator[Ask, Sequence[Score | None], Candidate | None]
"""What a search is while it runs: sent one score for each candidate of the round, None for one that cannot be
measured.
"""


@dataclass(frozen=True)
class Ground:
    """The experts of one search, as the sweep drew them.

    ids: {name: digest of its weights}, in the order of the spec. own: {name: the tasks it was trained for}.
    """

    ids: Mapping[str, str]
    own: Mapping[str, tuple[str, ...]]

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts' names."""
        return tuple(self.ids)

    def candidate(self, experts: Sequence[str], values: Mapping[str, Any]) -> Candidate:
        """Return the candidate of some of the experts."""
        return Candidate(tuple(name for name in self.ids if name in experts), tuple(values.items()))


class Search(Plugin, ABC):
    """A way to look for the best values or experts of a method. `name` is what a spec writes after `by:`."""

    tasks: Annotated[
        tuple[str, ...],
        Field(description="tasks whose mean decides; none: what decides everything else in the spec"),
    ] = ()

    @property
    def by_own_tasks(self) -> bool:
        """Whether it also looks at the scores of each expert's own tasks."""
        return False

    @abstractmethod
    def rounds(self, ground: Ground) -> Rounds:
        """Yield the rounds of the search. Equal ground and equal scores give equal rounds.

        Raise a MergeloomError where the search cannot go on. The best so far is then its result.
        """

    @abstractmethod
    def most(self, ground: Ground) -> int:
        """Return how many candidates it asks for, at most."""

    def trials(self) -> Iterator[Mapping[str, Any]]:
        """Return values at both ends of what is searched. They are refused where the method cannot have them."""
        yield {}

    def check(self, ground: Ground) -> None:
        """Raise SpecError where the search does not fit these experts."""

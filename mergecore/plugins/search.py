"""Searches: plans that grow. A search asks for the scores of some merges on validation items, hears them, and goes on.

A search is a generator. What it yields is one round of candidates, what it is sent are their scores, what it returns is
its result; it knows no store and no clock and draws from its seed alone. So the same scores always lead to the same
proposals: a search that was killed is played again from the scores on record and goes on where it was.
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

    experts: names, in the order of the spec. values: (path, value) of the method's parameters that differ from what the
    spec's entry says, as in ('drop.rate', 0.5); one value per expert stands in the order of `experts`.
    """

    experts: tuple[str, ...]
    values: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Score:
    """What a candidate scored on validation items, higher is better: what the search decides by, and each task."""

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
    """One round: candidates to be measured side by side, and the best so far, which is kept meanwhile."""

    candidates: tuple[Candidate, ...]
    best: Candidate | None = None


Rounds = Generator[Ask, Sequence[Score | None], Candidate | None]
"""What a search is while it runs: sent one score for each candidate of the round, None for one that cannot be measured."""


@dataclass(frozen=True)
class Ground:
    """The experts that one search has to do with, as the sweep drew them.

    ids: name → digest of its weights, in the order of the spec. own: name → the tasks it was trained for.
    """

    ids: Mapping[str, str]
    own: Mapping[str, tuple[str, ...]]

    @property
    def experts(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.ids)

    def candidate(self, experts: Sequence[str], values: Mapping[str, Any]) -> Candidate:
        """The candidate of some of them."""
        return Candidate(tuple(name for name in self.ids if name in experts), tuple(values.items()))


class Search(Plugin, ABC):
    """A way of looking for the best values or experts of a method; `name` is what a spec writes after `by:`."""

    tasks: Annotated[
        tuple[str, ...],
        Field(description="tasks whose mean decides; none: what decides everything else in the spec"),
    ] = ()

    @property
    def by_own_tasks(self) -> bool:
        """Whether it looks at the scores of each expert's own tasks besides."""
        return False

    @abstractmethod
    def rounds(self, ground: Ground) -> Rounds:
        """The search itself. Pure: the same ground and the same scores give the same rounds.

        Raises a MergeloomError where it cannot go on; the best so far is then its result.
        """

    @abstractmethod
    def most(self, ground: Ground) -> int:
        """How many candidates it may ask for, at most."""

    def trials(self) -> Iterator[Mapping[str, Any]]:
        """Values at both ends of what is searched, to be refused where the method cannot have them."""
        yield {}

    def check(self, ground: Ground) -> None:
        """Raise SpecError where these experts cannot be searched over."""

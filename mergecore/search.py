"""Searches: plans that grow. A search asks for the scores of some merges on validation items, hears them, and goes on.

A search is a generator. What it yields is one round of candidates, what it is sent are their scores, what it returns is
its result; it knows no store and no clock and draws from its seed alone. So the same scores always lead to the same
proposals: a search that was killed is played again from the scores on record and goes on where it was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from mergecore.errors import MergeloomError
from mergecore.method import Plugin

FRUITLESS = 5
"""A search ends where so many candidates were tried and not one could be measured: the next would fail as they did."""


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


@dataclass(frozen=True)
class Round:
    """One round that is over: what was asked, what was answered, and the best after it."""

    candidates: tuple[Candidate, ...]
    answers: tuple[Score | NoScore, ...]
    best: Candidate | None


@dataclass
class Run:
    """A search played as far as scores are known. `waiting`: what it asks for now; `trouble`: why it ended early."""

    search: Search
    ground: Ground
    rounds: list[Round] = field(default_factory=list)
    waiting: tuple[Candidate, ...] = ()
    best: Candidate | None = None
    ended: bool = False
    trouble: str = ""
    _playing: Rounds | None = None

    @property
    def candidates(self) -> Iterator[Candidate]:
        """Everything asked for so far, in this order; some may be named twice."""
        for round in self.rounds:
            yield from round.candidates
        yield from self.waiting

    def advance(self, known: Callable[[Candidate], Answer]) -> None:
        """Go on as far as scores are known. Where a failure was forgiven the search is played again from its start."""
        lost = (
            candidate
            for round in self.rounds
            for candidate, answer in zip(round.candidates, round.answers, strict=True)
            if isinstance(answer, NoScore)
        )
        if self._playing is None or any(not isinstance(known(candidate), NoScore) for candidate in lost):
            self.rounds, self.waiting, self.best, self.ended, self.trouble = [], (), None, False, ""
            self._playing = self.search.rounds(self.ground)
            self._step(None)
        while not self.ended:
            answers = tuple(answer for candidate in self.waiting if (answer := known(candidate)) is not None)
            if len(answers) < len(self.waiting):
                return
            self._answered(answers)

    def _answered(self, answers: tuple[Score | NoScore, ...]) -> None:
        asked = self.waiting
        self._step([answer if isinstance(answer, Score) else None for answer in answers])
        self.rounds.append(Round(asked, answers, self.best))
        tried = [answer for round in self.rounds for answer in round.answers]
        if not self.ended and len(tried) >= FRUITLESS and all(isinstance(answer, NoScore) for answer in tried):
            self._end(f"none of the first {len(tried)} candidates could be measured")

    def _step(self, scores: Sequence[Score | None] | None) -> None:
        """Send the scores of a round (None: begin) and take what is asked for next."""
        assert self._playing is not None
        try:
            asked = next(self._playing) if scores is None else self._playing.send(scores)
            self.waiting, self.best = asked.candidates, asked.best
        except StopIteration as end:
            self.best = end.value
            self._end("" if self.best else "no candidate could be measured")
        except MergeloomError as error:
            self._end(str(error))

    def _end(self, trouble: str) -> None:
        self.waiting, self.ended, self.trouble = (), True, trouble
        if self._playing is not None:
            self._playing.close()

"""How far a search has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from mergecore.errors import MergeloomError
from mergecore.plugins.search import Answer, Candidate, Ground, NoScore, Rounds, Score, Search

FRUITLESS = 5
"""A search ends where so many candidates were tried and not one could be measured: the next would fail as they did."""


@dataclass(frozen=True)
class AnsweredRound:
    """A round that is over: what was asked, what was answered, and the best after it."""

    candidates: tuple[Candidate, ...]
    answers: tuple[Score | NoScore, ...]
    best: Candidate | None


@dataclass
class SearchState:
    """A search, played as far as scores are known. waiting: what it asks for now. trouble: why it ended early."""

    search: Search
    ground: Ground
    rounds: list[AnsweredRound] = field(default_factory=list)
    waiting: tuple[Candidate, ...] = ()
    best: Candidate | None = None
    ended: bool = False
    trouble: str = ""
    _playing: Rounds | None = None

    @property
    def candidates(self) -> Iterator[Candidate]:
        """Yield everything asked for so far, in order. Some may come twice."""
        for round in self.rounds:
            yield from round.candidates
        yield from self.waiting

    def advance(self, known: Callable[[Candidate], Answer]) -> None:
        """Go on as far as scores are known. Where a failure was forgiven, play the search again from its start."""
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
        self.rounds.append(AnsweredRound(asked, answers, self.best))
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

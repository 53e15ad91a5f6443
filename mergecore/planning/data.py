"""The data that statistics on models look at: what identifies them, and whether scored items are among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergecore.errors import SpecError
from mergecore.identity.keys import digest
from mergecore.planning.pool import Member
from mergecore.planning.work import Work
from mergecore.plugins.evaluator import Evaluator, TaskIdentity
from mergecore.plugins.model_statistic import ModelStatistic, Use
from mergecore.plugins.own_code import OwnCode


@dataclass(frozen=True)
class ExpertData:
    """Says of each expert which items a statistic draws from. companions: digest of config and tokenizer.

    others: tasks of an expert that names none, for statistics that allow it. code: of the user, that runs the models.
    """

    evaluator: Evaluator
    folder: Path | None
    companions: str
    others: tuple[str, ...] = ()
    code: OwnCode = field(default_factory=OwnCode)
    _identities: dict[tuple[tuple[str, ...], str], str] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, member: Member, statistic: ModelStatistic) -> dict[str, Any]:
        """Return the tasks, and what identifies their items, for the key. Raises SpecError for an expert without."""
        names = member.tasks or (() if statistic.own_tasks else self.others)
        if not names:
            raise SpecError(
                f"'{statistic.name}' looks at items of each expert's own tasks, and expert '{member.name}' names none; "
                "write `tasks: [..]` in its entry"
            )
        inputs = statistic.use.inputs
        if (names, inputs) not in self._identities:
            self._identities[names, inputs] = digest(self.evaluator.inputs_identity(names, inputs, self.folder))
        drawn = self._identities[names, inputs]
        return {"tasks": list(names), inputs: drawn, "companions": self.companions, **self.code.identity}


def uses(work: Work) -> tuple[Use, ...]:
    """Return what a work and those that it needs look at, each once."""
    return tuple(dict.fromkeys(needed.use for needed in (*work.needed, work) if needed.use is not None))


@dataclass(frozen=True)
class Apart:
    """Refuses merges that were made with training items on which they are scored. tasks: test items, by task."""

    evaluator: Evaluator
    folder: Path | None
    tasks: Mapping[str, TaskIdentity]
    _learned: dict[tuple[Use, tuple[str, ...]], frozenset[str]] = field(default_factory=dict, compare=False, repr=False)
    _scored: dict[str, frozenset[str]] = field(default_factory=dict, compare=False, repr=False)

    def check(self, work: Work, scored: Sequence[str]) -> None:
        """Raise SpecError where a training item that the merge is made with is a test item of a task it is scored on.

        Nothing is said of evaluators that do not tell their documents.
        """
        for use, names in _looked_at(work):
            if use.inputs != "training":
                continue
            learned_on = self._learned_on(use, names)
            for task in scored if learned_on else ():
                if both := learned_on & self._scored_on(task):
                    raise SpecError(
                        f"{len(both)} of the training items of {', '.join(names)} that this merge is made with are "
                        f"test items of task '{task}', so that it would be scored on what it has seen; take "
                        "them out of the training split"
                    )

    def _learned_on(self, use: Use, names: tuple[str, ...]) -> frozenset[str]:
        if (use, names) not in self._learned:
            drawn = self.evaluator.drawn(names, use.inputs, use.items, use.seed, self.folder)
            self._learned[use, names] = drawn or frozenset()
        return self._learned[use, names]

    def _scored_on(self, task: str) -> frozenset[str]:
        if task not in self._scored:
            self._scored[task] = self.evaluator.documents(self.tasks[task], self.folder) or frozenset()
        return self._scored[task]


def _looked_at(work: Work) -> Iterator[tuple[Use, tuple[str, ...]]]:
    """Yield what is looked at of which tasks, each once."""
    known = set()
    for needed in (*work.needed, work):
        for names in needed.tasks_seen:
            if needed.use is not None and (needed.use, names) not in known:
                known.add((needed.use, names))
                yield needed.use, names

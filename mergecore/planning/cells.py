"""A cell is one model to build and measure; a plan is all cells of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergecore.checkpoints.select import SelectRule
from mergecore.identity.keys import Step, digest
from mergecore.planning.pool import Member, Pool
from mergecore.planning.work import MergeWork
from mergecore.plugins.evaluator import Evaluator, Split, TaskIdentity
from mergecore.plugins.own_code import OwnCode
from mergecore.plugins.search import Candidate, Ground
from mergecore.reporting.scores import Kind, Suite
from mergecore.spec.search_entry import Searched
from mergecore.spec.sizes import size_in_bytes
from mergecore.spec.sweep import Spec


@dataclass(frozen=True)
class Cell:
    """One model to build and measure. `merge` is None where the model is a checkpoint as it stands.

    method: the label of its variant, under which it stands in tables and figures; '' for baselines. subset: −1 for
    baselines. refused: why it cannot be built, '' where it can.
    """

    id: str
    kind: Kind
    name: str
    model: Step
    method: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    count: int = 0
    subset: int = -1
    experts: tuple[str, ...] = ()
    merge: MergeWork | None = None
    member: Member | None = None
    tasks: tuple[str, ...] = ()
    refused: str = ""
    loads: Mapping[str, str] = field(default_factory=dict)
    """Of a product: task → id of the expert whose model is loaded for it."""
    select: tuple[SelectRule, ...] = ()
    """Of a merge: what it merges and how, tensor by tensor."""
    merged: tuple[str, ...] | None = None
    """The experts that are merged, where a search merges some of `experts` only."""
    deciding: tuple[str, ...] = ()
    """The tasks on whose validation items something is decided."""

    def tasks_on(self, split: Split) -> tuple[str, ...]:
        """Return the tasks that are measured on a split."""
        return self.tasks if split == "test" else self.deciding

    @property
    def group(self) -> tuple[str, int, int]:
        """What cells have in common that differ in their values only. One cell of a group is chosen on validation
        items.
        """
        return (self.method if self.kind == "merge" else self.id, self.count, self.subset)


@dataclass(frozen=True)
class PlannedSearch:
    """A search over the experts of one count and subset."""

    entry: Searched
    ground: Ground
    count: int
    subset: int

    @property
    def group(self) -> tuple[str, int, int]:
        """The group of its cells. The search chooses one of them."""
        return self.entry.label, self.count, self.subset

    @property
    def name(self) -> str:
        return f"{self.entry.label} n{self.count} s{self.subset}"


@dataclass(frozen=True)
class Plan:
    """Everything a sweep consists of. Searches add cells while scores come in (see Frontier)."""

    spec: Spec
    pool: Pool
    suite: Suite
    cells: tuple[Cell, ...]
    evaluators: Mapping[Split, Evaluator]
    tasks: Mapping[Split, Mapping[str, TaskIdentity]]
    folder: Path | None
    searches: tuple[PlannedSearch, ...] = ()
    candidate: Callable[[PlannedSearch, Candidate], Cell] | None = None
    """The cell of what a search asks for."""
    notes: tuple[str, ...] = ()
    """To be said aloud."""
    code: OwnCode = field(default_factory=OwnCode)
    """The user's own, that scores depend on."""
    _digests: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    _evaluations: dict[tuple[str, str, str], Step] = field(default_factory=dict, compare=False, repr=False)

    def evaluation(self, cell: Cell, split: Split, task: str) -> Step:
        """Return the step that scores a cell's model on one task."""
        place = (cell.id, split, task)
        if place not in self._evaluations:
            self._evaluations[place] = self._evaluation(cell, split, task)
        return self._evaluations[place]

    def _evaluation(self, cell: Cell, split: Split, task: str) -> Step:
        evaluator, identity = self.evaluators[split], self.tasks[split][task]
        known = f"{split}/{task}"
        if known not in self._digests:
            self._digests[known] = digest(dict(identity.identity))
            self._digests[split] = digest(evaluator.parameters())
        return Step(
            "evaluation",
            evaluator.name,
            evaluator.version,
            {
                "task": task,
                "identity": self._digests[known],
                "settings": self._digests[split],
                **self.code.identity,
            },
            {
                "model": cell.model.key,
                "companions": self.companions(cell).companions,
                **({"expert": cell.loads[task]} if cell.loads else {}),
            },
        )

    def companions(self, cell: Cell) -> Any:
        """Return the snapshot whose config and tokenizer go with the cell's model."""
        if cell.merge is None:
            return (self.pool.base if cell.member is None else cell.member.snapshot).as_stored
        return self.pool.base

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that are measured, validation first where the spec has it."""
        return tuple(self.evaluators)

    @property
    def shard_size(self) -> int:
        """Bytes of a shard at most."""
        return size_in_bytes(self.spec.output.shard_size)


@dataclass(frozen=True)
class Scoring:
    """A cell, and the tasks on which its model is still to be scored."""

    cell: Cell
    tasks: tuple[tuple[Split, TaskIdentity, Step], ...]

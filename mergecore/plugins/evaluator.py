"""What an evaluator is: it scores a model on tasks.

An evaluator's fields are what can change the numbers (batch size, dtype, few-shot, seeds …). `resolve` is cheap and
imports no model code. `open` is expensive and is done once per process. The `Resident` that it returns swaps weights in
place.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch

from mergecore.errors import EvaluationError, MismatchError
from mergecore.events import Report
from mergecore.plugins.model_statistic import Calibration, Seen, Slot, TaskInputs
from mergecore.plugins.plugin import Plugin
from mergecore.reporting.scales import Scale
from mergecore.tensors.source import TensorInfo, TensorSource

Split = Literal["validation", "test"]

FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
"""How a field names a function of a user's module."""


@dataclass(frozen=True)
class TaskIdentity:
    """One task on one split, resolved. `identity` is plain JSON and enters the evaluation's key whole.

    identity: the resolved configuration, the SHA-256 of the data, the limit, the seeds and the versions that matter.
    items: how many items are scored. metric: the name of the primary metric. scale: how the mean of the items' scores
    is shown; the scores themselves are such that higher is better.
    """

    task: str
    split: Split
    items: int
    metric: str
    identity: Mapping[str, Any]
    scale: Scale = "mean"


class Evaluator(Plugin, ABC):
    """Scores models on tasks."""

    @abstractmethod
    def resolve(self, tasks: Sequence[str], split: Split, folder: Path | None) -> dict[str, TaskIdentity]:
        """Return {task: identity} without loading a model. folder: the spec's `path` of task files.

        Raise EvaluationError for a task that does not exist (with the nearest name), lacks the split, or cannot be
        read.
        """

    def members(self, names: Sequence[str], folder: Path | None) -> Mapping[str, tuple[str, ...]]:
        """Return the tasks that each name stands for: itself, or those of a group where the evaluator knows groups."""
        return {name: (name,) for name in names}

    @property
    def factories(self) -> tuple[str, ...]:
        """Return the modules of a user that are called: those that a field names as 'package.module:function'.

        Their content enters the key, as that of the evaluator's own module does; see `own_code`.
        """
        values = (getattr(self, name) for name in type(self).model_fields)
        return tuple(value.partition(":")[0] for value in values if isinstance(value, str) and FACTORY.match(value))

    def documents(self, task: TaskIdentity, folder: Path | None) -> frozenset[str] | None:
        """Return digests of the items that are scored, so that overlap of splits can be seen.

        None: more than the task's files would have to be read.
        """
        return None

    def check(self, config: Mapping[str, Any], files: Collection[str], chat_template: str | None) -> None:
        """Check that models can be scored, before any is made. Nothing is checked unless an evaluator does.

        config: the models' config.json. files: the names of the files beside it. chat_template: of their tokenizer.
        Raise EvaluationError where they cannot be scored, PluginError where a module cannot be imported.
        """

    @abstractmethod
    def training_identity(self, tasks: Sequence[str], folder: Path | None) -> dict[str, Any]:
        """Return what `Resident.calibration` draws from, as plain JSON. It enters the key of a statistic on data."""

    def inputs_identity(self, tasks: Sequence[str], inputs: Seen, folder: Path | None) -> dict[str, Any]:
        """Return what `Resident.inputs` draws from, as plain JSON. It enters the key of a statistic on models."""
        if inputs == "training":
            return self.training_identity(tasks, folder)
        return {name: dict(task.identity) for name, task in self.resolve(tasks, inputs, folder).items()}

    def drawn(
        self, tasks: Sequence[str], inputs: Seen, items: int, seed: int, folder: Path | None
    ) -> frozenset[str] | None:
        """Return the digests of what `Resident.inputs` draws, so that overlap with scored items can be seen.

        None: more than the tasks' files would have to be read.
        """
        return None

    @abstractmethod
    def open(self, companions: Path, folder: Path | None) -> Resident:
        """Return a shell without weights, from the config and tokenizer files in `companions`."""


class Resident(ABC):
    """A shell in memory whose weights are swapped in place. Tokenizer, documents and token ids stay with it."""

    @property
    @abstractmethod
    def model(self) -> torch.nn.Module:
        """The module, in eval mode."""

    @abstractmethod
    def swap(self, weights: TensorSource) -> None:
        """Swap these weights in. Every parameter is filled with NaN first, so that one left over cannot pass.

        Raise MismatchError naming tensors that are missing, unexpected or of another shape.
        """

    @abstractmethod
    def score(self, task: TaskIdentity, report: Report) -> pa.Table:
        """Return one row per item: item (int64), document (string digest), target (string), prediction (string), score
        (float64, the primary metric, higher is better: see `TaskIdentity.scale`), and further columns of the evaluator
        (log-likelihoods …).
        """

    @abstractmethod
    def calibration(self, tasks: Sequence[str], items: int, seed: int) -> Calibration:
        """Return `items` training items of the tasks, shared out evenly, drawn by a hash of (seed, document)."""

    def inputs(self, tasks: Sequence[str], inputs: Seen, items: int, seed: int, labels: bool) -> Sequence[TaskInputs]:
        """Return the items of each task, shared out evenly, drawn by a hash of (seed, document). No answer is in them.

        labels: whether right answers may be asked for. Raises EvaluationError where a task has no such items.
        """
        raise EvaluationError(
            f"{type(self).__name__} gives no inputs without their answers, which learned merges need; use another "
            "evaluator, or add `inputs` to this one"
        )

    def slots(self, tensors: Mapping[str, TensorInfo], names: Iterable[str]) -> Mapping[str, Slot]:
        """Return where tensors of a checkpoint lie in the module. tensors: all of the checkpoint.

        Raises MismatchError for one that lies nowhere.
        """
        known = self.model.state_dict(keep_vars=True)
        for name in names:
            if name not in known:
                raise MismatchError(f"tensor '{name}' is no parameter of this {type(self.model).__name__}")
        return {name: Slot(name) for name in names}


def shared_out(items: int, tasks: int) -> list[int]:
    """Return how many of `items` each task has: as many as the others, or one more where it stands further in front."""
    share, more = divmod(items, max(tasks, 1))
    return [share + (position < more) for position in range(tasks)]

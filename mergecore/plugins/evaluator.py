"""What an evaluator is: it scores one model on one task.

An evaluator's fields are what can change the numbers (batch size, dtype, few-shot, seeds …). `resolve` is cheap and
imports no model code; `open` is expensive and done once per process; the `Resident` it returns swaps weights in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch

from mergecore.events import Report
from mergecore.plugins.plugin import Plugin
from mergecore.plugins.statistic import Calibration
from mergecore.tensors.source import TensorSource

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class TaskIdentity:
    """One task on one split, resolved: `identity` is plain JSON and enters the evaluation's key whole.

    identity holds the resolved configuration, the SHA-256 of the data, the limit, the seeds and the versions that
    matter. items: how many items will be scored. metric: the name of the primary metric (higher is better).
    """

    task: str
    split: Split
    items: int
    metric: str
    identity: Mapping[str, Any]


class Evaluator(Plugin, ABC):
    """Scores models on tasks."""

    @abstractmethod
    def resolve(self, tasks: Sequence[str], split: Split, folder: Path | None) -> dict[str, TaskIdentity]:
        """What each task is, without loading a model. folder: the spec's `path` of task files.

        Raises EvaluationError for a task that does not exist (nearest name), lacks the split, or cannot be read.
        """

    def documents(self, task: TaskIdentity, folder: Path | None) -> frozenset[str] | None:
        """Digests of the items that will be scored, to see whether two splits share some; None where that takes more
        than reading the task's files."""
        return None

    @abstractmethod
    def training_identity(self, tasks: Sequence[str], folder: Path | None) -> dict[str, Any]:
        """What `Resident.calibration` draws from, as plain JSON: it enters the key of a statistic on data."""

    @abstractmethod
    def open(self, companions: Path, folder: Path | None) -> Resident:
        """A model shell (weights not yet set) from the config and tokenizer files in `companions`."""


class Resident(ABC):
    """One model in memory whose weights are swapped in place, with tokenizer, documents and token ids kept."""

    @property
    @abstractmethod
    def model(self) -> torch.nn.Module:
        """The module, in eval mode."""

    @abstractmethod
    def swap(self, weights: TensorSource) -> None:
        """Put these weights in. Every parameter is filled with NaN first, so that one left over cannot pass.

        Raises MismatchError naming tensors that are missing, unexpected or of another shape.
        """

    @abstractmethod
    def score(self, task: TaskIdentity, report: Report) -> pa.Table:
        """One row per item: item (int64), document (string digest), target (string), prediction (string),
        score (float64, the primary metric), and whatever else the evaluator has to tell (log-likelihoods …)."""

    @abstractmethod
    def calibration(self, tasks: Sequence[str], items: int, seed: int) -> Calibration:
        """`items` training items of the tasks (shared out evenly), drawn by a hash of (seed, document)."""

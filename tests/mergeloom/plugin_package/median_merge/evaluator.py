"""Scores a matrix: the row that is nearest to an input must be the one of its label."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import torch
from torch import nn

from mergecore.errors import EvaluationError
from mergecore.events import Event, Report
from mergecore.plugins.evaluator import Evaluator, Resident, Split, TaskIdentity
from mergecore.plugins.model_statistic import Calibration
from mergecore.tensors.source import TensorSource


class NearestRow(Evaluator):
    """Share of inputs whose nearest row of the tensor `weight` is the row of their label.

    A task is a file, `<folder>/<task>.json`: {split: [[input, label], …]}.
    """

    name: ClassVar[str] = "nearest_row"
    version: ClassVar[int] = 1

    limit: int | None = None

    def resolve(self, tasks: Sequence[str], split: Split, folder: Path | None) -> dict[str, TaskIdentity]:
        resolved = {}
        for task in tasks:
            items = _items(folder, task, split)[: self.limit]
            identity = {"data": hashlib.sha256(json.dumps(items).encode()).hexdigest(), "split": split}
            resolved[task] = TaskIdentity(task, split, len(items), "acc", identity)
        return resolved

    def training_identity(self, tasks: Sequence[str], folder: Path | None) -> dict[str, Any]:
        return {"tasks": list(tasks)}

    def open(self, companions: Path, folder: Path | None) -> Resident:
        return _Matrix(folder)


class _Matrix(Resident):
    """One matrix whose numbers are swapped."""

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._module = folder, nn.Linear(4, 3, bias=False)

    @property
    def model(self) -> nn.Module:
        return self._module

    def swap(self, weights: TensorSource) -> None:
        with torch.no_grad():
            self._module.weight.copy_(weights.read("weight").reshape(3, 4))

    def score(self, task: TaskIdentity, report: Report) -> pa.Table:
        rows = []
        for number, (values, label) in enumerate(_items(self._folder, task.task, task.split)[: task.items]):
            distances = (self._module.weight.detach() - torch.tensor(values)).square().sum(-1)
            nearest = int(distances.argmin())
            document = hashlib.sha256(json.dumps(values).encode()).hexdigest()
            rows.append((number, document, str(label), str(nearest), float(nearest == label)))
            report(Event(f"evaluate {task.task}", number + 1, task.items, "items"))
        names = ("item", "document", "target", "prediction", "score")
        return pa.table({name: [row[column] for row in rows] for column, name in enumerate(names)})

    def calibration(self, tasks: Sequence[str], items: int, seed: int) -> Calibration:
        raise EvaluationError("nearest_row has no training items")


def _items(folder: Path | None, task: str, split: str) -> list[tuple[list[float], int]]:
    path = (folder or Path()) / f"{task}.json"
    if not path.is_file():
        raise EvaluationError(f"there is no task '{task}': {path} does not exist")
    return [(values, label) for values, label in json.loads(path.read_text())[split]]

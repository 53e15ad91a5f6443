"""Small classifiers scored on arrays: one resident module, BatchNorm statistics recomputed for merged weights."""

from __future__ import annotations

import importlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor, nn

from mergecore.checkpoints.sources.digests import file_sha256
from mergecore.errors import EvaluationError, NonFiniteError, PluginError, SpecError, nearest
from mergecore.evaluators.classification_tasks import (
    SPLITS,
    ClassifierItems,
    array_of,
    drawn_items,
    items_of,
    path_of,
)
from mergecore.evaluators.weights import blank, check_fit, fill
from mergecore.events import Event, Report
from mergecore.plugins.evaluator import Evaluator, Resident, Split, TaskIdentity, shared_out
from mergecore.plugins.model_statistic import LABELS_NOT_USED, Seen, TaskInputs
from mergecore.tensors.source import TensorSource

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Classification(Evaluator):
    """Accuracy of a classifier; a task is one file, `<folder>/<task>.npz` or `.safetensors`.

    A file holds `<split>.inputs` (items, …) and `<split>.labels` (items,) for the splits train, validation and test.
    Where the task has a frozen head of its own it holds `head.weight` (classes, features) and may hold `head.bias`
    (classes,): the module then gives features (items, features), and logits are features · weightᵀ + bias.
    model: 'package.module:function' that makes the module from the config.json of the model (a dict).
    limit: the first so many items of a split (None: all). batch_size: items in one pass.
    recalibrate: 'batchnorm' recomputes the running statistics of BatchNorm layers, where the model has any, as the
    plain average over batches of `recalibration_items` training inputs; weights that were averaged need this.
    recalibration_tasks: whose inputs these are, shared out evenly (empty: those of the task being scored alone).
    seed: of the hash that draws them.
    """

    name: ClassVar[str] = "classification"

    model: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    batch_size: Annotated[int, Field(ge=1)] = 128
    limit: Annotated[int, Field(ge=1)] | None = None
    recalibrate: Literal["none", "batchnorm"] = "batchnorm"
    recalibration_items: Annotated[int, Field(ge=2)] = 256
    recalibration_tasks: tuple[str, ...] = ()
    seed: int = 0

    def resolve(self, tasks: Sequence[str], split: Split, folder: Path | None) -> dict[str, TaskIdentity]:
        """What each task is: the SHA-256 of its file and of those BatchNorm is recalibrated on.

        Raises EvaluationError for an unknown task (nearest name) and a file that lacks the split.
        """
        calibrated = self.recalibration_tasks if self.recalibrate == "batchnorm" else ()
        others = {name: file_sha256(path_of(name, folder)) for name in calibrated}
        identities = {}
        for name in tasks:
            path = path_of(name, folder)
            count = len(array_of(path, f"{split}.labels"))
            data = {"sha256": file_sha256(path), "split": split, "recalibration": others}
            identity = {"data": data, "documents": count, "evaluator": self.parameters()}
            identities[name] = TaskIdentity(name, split, min(count, self.limit or count), "acc", identity)
        return identities

    def documents(self, task: TaskIdentity, folder: Path | None) -> frozenset[str] | None:
        """Inputs and label of each item."""
        return frozenset(items_of(path_of(task.task, folder), task.split).documents[: task.items])

    def check(self, config: Mapping[str, Any], files: Collection[str], chat_template: str | None) -> None:
        """Make the module once. Raises what `open` does."""
        if "config.json" not in files:
            raise EvaluationError("there is no config.json to make the module from")
        _module(self.model, config)

    def training_identity(self, tasks: Sequence[str], folder: Path | None) -> dict[str, Any]:
        """What `Resident.calibration` draws from, as plain JSON for a statistic's key."""
        data = {name: file_sha256(path_of(name, folder)) for name in tasks}
        return {"tasks": data, "evaluator": self.parameters()}

    def drawn(
        self, tasks: Sequence[str], inputs: Seen, items: int, seed: int, folder: Path | None
    ) -> frozenset[str] | None:
        """Inputs and label of each item that `Resident.inputs` or `Resident.calibration` draws."""
        shares = zip(tasks, shared_out(items, len(tasks)), strict=True)
        own = [drawn_items([path_of(name, folder)], count, seed, SPLITS[inputs]).documents for name, count in shares]
        return frozenset(document for documents in own for document in documents)

    def open(self, companions: Path, folder: Path | None) -> Resident:
        """The module that `model` makes of `companions`/config.json, on the CPU; `.model.to(device)` moves it."""
        return _ClassifierResident(self, companions, folder)


class ClassifierInputs(TaskInputs):
    """Items of one task without their classes."""

    def __init__(self, task: str, items: ClassifierItems, classes: int, labels: bool) -> None:
        self.task, self.documents, self.classes = task, items.documents, classes
        self._items, self._labels = items, labels

    def logits(self, model: nn.Module, items: Sequence[int]) -> Tensor:
        """(items, classes), float32, differentiable; one pass for all."""
        return self._items.together(model, self._items.inputs[list(items)])

    def run(self, model: nn.Module, items: Sequence[int]) -> None:
        """One pass for all items."""
        self.logits(model, items)

    def labels(self, items: Sequence[int]) -> Tensor:
        """The right classes. Raises SpecError where labels are not used."""
        if not self._labels:
            raise SpecError(LABELS_NOT_USED)
        return self._items.targets[list(items)]


class _ClassifierResident(Resident):
    """A classifier whose weights are swapped in place."""

    def __init__(self, evaluator: Classification, companions: Path, folder: Path | None) -> None:
        self._evaluator, self._folder = evaluator, folder
        self._model = _made(evaluator.model, companions).eval()
        blank(self._model)
        self._norms = [module for module in self._model.modules() if isinstance(module, _BATCH_NORMS)]
        self._filled = False
        self._recalibrated: tuple[str, ...] | None = None
        self._held: dict[tuple[str, Split], tuple[TaskIdentity, ClassifierItems]] = {}
        self._training: dict[tuple[tuple[str, ...], int, int], ClassifierItems] = {}

    @property
    def model(self) -> nn.Module:
        """The module, in eval mode."""
        return self._model

    def swap(self, weights: TensorSource) -> None:
        """Put these weights in, NaN everywhere first; BatchNorm statistics follow now or before the first score.

        Raises MismatchError naming tensors that are missing, unexpected or of another shape; NonFiniteError.
        """
        self._filled = False
        self._recalibrated = None
        check_fit(self._model, weights)
        blank(self._model)
        fill(self._model, weights)
        self._model.eval()
        self._filled = True
        if self._evaluator.recalibration_tasks:
            self._recalibrate(self._evaluator.recalibration_tasks)

    def score(self, task: TaskIdentity, report: Report) -> pa.Table:
        """One row per item; target and prediction are class numbers, loglikelihoods of all classes in nats.

        Raises EvaluationError where the file is no longer what was resolved or no weights are in; NonFiniteError.
        """
        if not self._filled:
            raise EvaluationError("the evaluator holds no weights: swap a model in before scoring")
        items = self._items(task)
        self._recalibrate(self._evaluator.recalibration_tasks or (task.task,))
        rows: list[Tensor] = []
        with torch.no_grad():
            for start in range(0, task.items, self._evaluator.batch_size):
                stop = min(start + self._evaluator.batch_size, task.items)
                rows.append(items.together(self._model, items.inputs[start:stop]).double().log_softmax(-1).cpu())
                report(Event(f"evaluate {task.task}", stop, task.items, "items"))
        logits = torch.cat(rows)
        if torch.isnan(logits).any():
            item = int(torch.isnan(logits).any(-1).nonzero()[0])
            raise NonFiniteError(f"task '{task.task}', item {item}: the model gives NaN")
        return _table(logits, items)

    def calibration(self, tasks: Sequence[str], items: int, seed: int) -> ClassifierItems:
        """Training items of the tasks, shared out evenly, with the lowest hash(seed, document), in that order."""
        key = (tuple(tasks), items, seed)
        if key not in self._training:
            self._training[key] = drawn_items([path_of(name, self._folder) for name in tasks], items, seed)
        return self._training[key]

    def inputs(
        self, tasks: Sequence[str], inputs: Seen, items: int, seed: int, labels: bool
    ) -> Sequence[ClassifierInputs]:
        """The items of each task that `Classification.drawn` names, without their classes."""
        drawn = []
        for name, count in zip(tasks, shared_out(items, len(tasks)), strict=True):
            own = drawn_items([path_of(name, self._folder)], count, seed, SPLITS[inputs])
            with torch.no_grad():  # the width alone: there may be no weights yet
                classes = own.together(self._model, own.inputs[:1]).shape[-1]
            drawn.append(ClassifierInputs(name, own, classes, labels))
        return drawn

    def _items(self, task: TaskIdentity) -> ClassifierItems:
        """The task's items, read once and checked against what was resolved."""
        kept = self._held.get((task.task, task.split))
        if kept is not None and kept[0] == task:
            return kept[1]
        # One resident serves validation and test items, whose limits may differ: the task says which holds.
        asked = self._evaluator.model_copy(update={"limit": task.identity["evaluator"]["limit"]})
        if asked.resolve([task.task], task.split, self._folder)[task.task] != task:
            raise EvaluationError(f"task '{task.task}' is not what it was when it was resolved; plan again")
        items = items_of(path_of(task.task, self._folder), task.split)
        self._held[task.task, task.split] = (task, items)
        return items

    def _recalibrate(self, tasks: tuple[str, ...]) -> None:
        """Running statistics of BatchNorm as the average over equal batches of the tasks' training inputs."""
        wanted = self._evaluator.recalibrate == "batchnorm" and self._norms
        if not wanted or self._recalibrated == tasks:
            return
        drawn = self.calibration(tasks, self._evaluator.recalibration_items, self._evaluator.seed)
        batches = max(1, round(len(drawn) / self._evaluator.batch_size))
        device = next(self._model.parameters()).device
        with _cumulative(self._norms), torch.no_grad():
            for batch in drawn.inputs.tensor_split(batches):
                self._model(batch.to(device))
        self._recalibrated = tasks


@contextmanager
def _cumulative(norms: Sequence[Any]) -> Iterator[None]:
    """BatchNorm layers gather statistics anew, every batch with the same weight; all other layers stay in eval mode."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


def _made(factory: str, companions: Path) -> nn.Module:
    """The module of a folder's config. Raises EvaluationError without a config.json, and what `_module` does."""
    path = companions / "config.json"
    if not path.is_file():
        raise EvaluationError(f"{companions} holds no config.json: there is no model to score")
    return _module(factory, json.loads(path.read_text()))


def _module(factory: str, config: Mapping[str, Any]) -> nn.Module:
    """The module of a config. Raises PluginError where the factory's file cannot be imported, SpecError for a factory
    that is not there, EvaluationError for one that fails.
    """
    name, _, attribute = factory.partition(":")
    try:
        module = importlib.import_module(name)
    except Exception as error:  # its own lines may raise anything
        raise PluginError(
            f"model '{factory}': the module '{name}' cannot be imported ({type(error).__name__}: {error}); install it, "
            "or start in its folder, or put that on PYTHONPATH"
        ) from error
    if not hasattr(module, attribute):
        raise SpecError(f"model '{factory}': '{name}' has no '{attribute}'; {nearest(attribute, vars(module))}")
    try:
        network = getattr(module, attribute)(dict(config))
    except Exception as error:  # a factory may raise anything
        raise EvaluationError(
            f"model '{factory}' fails for this config.json: {type(error).__name__}: {error}; it is called with the "
            "config as a dict and must return a torch module"
        ) from error
    if not isinstance(network, nn.Module):
        raise SpecError(f"model '{factory}' gave a {type(network).__name__}, not a torch module")
    return network


def _table(scores: Tensor, items: ClassifierItems) -> pa.Table:
    count = len(scores)
    predicted, targets = scores.argmax(-1), items.targets[:count]
    columns = {
        "item": pa.array(range(count), pa.int64()),
        "document": pa.array(items.documents[:count], pa.string()),
        "target": pa.array([str(label) for label in targets.tolist()], pa.string()),
        "prediction": pa.array([str(label) for label in predicted.tolist()], pa.string()),
        "score": pa.array((predicted == targets).double().tolist(), pa.float64()),
        "loglikelihoods": pa.array(scores.tolist(), pa.list_(pa.float64())),
    }
    return pa.table(columns)

"""The task files of `classification`: arrays of inputs and labels, and a frozen head where a task has its own."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn

from mergecore.errors import EvaluationError, nearest
from mergecore.identity.keys import digest
from mergecore.plugins.evaluator import shared_out

SPLITS = {"training": "train", "validation": "validation", "test": "test"}
"""What a file calls its splits."""


@dataclass(frozen=True)
class Head:
    """A frozen linear layer of a task. weight: (classes, features), float32. bias: (classes,), float32."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Return (items, classes), float32, of features (items, features).

        Raises EvaluationError where the features are others.
        """
        if features.dim() != 2 or features.shape[1] != self.weight.shape[1]:
            raise EvaluationError(
                f"the model gives {list(features.shape[1:])} numbers an item, and the task's head.weight "
                f"{list(self.weight.shape)} takes {self.weight.shape[1]}; make the head for this model"
            )
        weight, bias = self.weight.to(features.device), self.bias.to(features.device)
        return nn.functional.linear(features.float(), weight, bias)


@dataclass(frozen=True)
class ClassifierItems:
    """Items of tasks, for scores and for statistics that need the model's own predictions (a `Calibration`).

    inputs: (items, …). targets: (items,), int64. documents: a digest of each. heads: of the tasks; None where the model
    gives logits itself. places: (items,), which of the heads is an item's.
    """

    inputs: Tensor
    targets: Tensor
    documents: tuple[str, ...]
    heads: tuple[Head | None, ...]
    places: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.targets)

    def logits(self, model: nn.Module, items: Sequence[int]) -> list[Tensor]:
        """Return (1, classes) for each item, float32, differentiable. One pass for all."""
        inputs = self.inputs[list(items)].to(next(model.parameters()).device)
        rows = outputs_of(model, inputs).float()
        heads = [self.heads[self.places[item]] for item in items]
        return [row[None] if head is None else head.logits(row[None]) for row, head in zip(rows, heads, strict=True)]

    def together(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return (items, classes), float32, differentiable, of inputs of the only task."""
        (head,) = self.heads
        outputs = outputs_of(model, inputs.to(next(model.parameters()).device))
        return outputs.float() if head is None else head.logits(outputs)

    def labels(self, items: Sequence[int]) -> list[Tensor]:
        """Return the true class of each item, shape (1,), int64."""
        return [target[None] for target in self.targets[list(items)]]


def outputs_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return (items, classes or features), whether the model returns a tensor or an object with `logits`."""
    out = model(inputs)
    logits: Tensor = getattr(out, "logits", out)
    return logits


def path_of(task: str, folder: Path | None) -> Path:
    """Return the task's file. Raises EvaluationError with the nearest name."""
    if folder is None or not folder.is_dir():
        raise EvaluationError(f"classification tasks are files in a folder; {folder} is none (set evaluate.path)")
    files = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in (".npz", ".safetensors")}
    if task not in files:
        raise EvaluationError(f"there is no task '{task}' in {folder.name}: {nearest(task, files)}")
    return files[task]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Sequence[str], Callable[[str], NDArray[Any]]]]:
    """Open a task file: the names of its arrays, and a function that reads one. Raises EvaluationError if damaged."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                yield list(archive.files), lambda name: np.asarray(archive[name])
        else:
            with safe_open(path, framework="numpy") as opened:
                yield list(opened.keys()), lambda name: np.asarray(opened.get_tensor(name))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"the task file {path.name} cannot be read: {error}") from error


def array_of(path: Path, name: str) -> NDArray[Any]:
    """Return an array of a task file. Raises EvaluationError naming what the file has instead."""
    with _opened(path) as (names, read):
        if name in names:
            return read(name)
    raise EvaluationError(f"task '{path.stem}' has no {name}; its file has: {', '.join(names)}")


def _head(path: Path) -> Head | None:
    """Return the task's own head; None where its file has none. Raises EvaluationError for one of wrong shapes."""
    with _opened(path) as (names, read):
        if "head.weight" not in names:
            return None
        weight = read("head.weight")
        bias = read("head.bias") if "head.bias" in names else np.zeros(weight.shape[:1], np.float32)
    if (
        weight.ndim != 2
        or bias.shape != weight.shape[:1]
        or not (np.isfinite(weight).all() and np.isfinite(bias).all())
    ):
        raise EvaluationError(
            f"task '{path.stem}': head.weight {list(weight.shape)} and head.bias {list(bias.shape)} must be finite, of "
            "shapes (classes, features) and (classes,)"
        )
    return Head(torch.from_numpy(weight.astype(np.float32)), torch.from_numpy(bias.astype(np.float32)))


def items_of(path: Path, split: str) -> ClassifierItems:
    """Return all items of a split. Floating inputs become float32, integers stay what they are."""
    inputs, labels = array_of(path, f"{split}.inputs"), array_of(path, f"{split}.labels")
    if len(inputs) != len(labels):
        raise EvaluationError(f"task '{path.stem}': {len(inputs)} {split} inputs but {len(labels)} labels")
    if np.issubdtype(inputs.dtype, np.floating):
        inputs = inputs.astype(np.float32)
    names = tuple(
        hashlib.sha256(np.ascontiguousarray(row).tobytes() + str(label).encode()).hexdigest()
        for row, label in zip(inputs, labels.tolist(), strict=True)
    )
    head = _head(path)
    if head is not None and len(labels) and not 0 <= labels.min() <= labels.max() < len(head.weight):
        raise EvaluationError(
            f"task '{path.stem}': its {split} labels go from {labels.min()} to {labels.max()}, and its head has "
            f"{len(head.weight)} classes, counted from 0"
        )
    targets = torch.from_numpy(labels.astype(np.int64))
    return ClassifierItems(torch.from_numpy(inputs), targets, names, (head,), (0,) * len(names))


def drawn_items(paths: Sequence[Path], items: int, seed: int, split: str = "train") -> ClassifierItems:
    """Return `items` items of a split, a share of each file, mixed by their hashes so that batches hold all tasks.

    Raises EvaluationError where a file has none.
    """
    tables = [items_of(path, split) for path in paths]
    drawn = []
    for position, (part, share) in enumerate(zip(tables, shared_out(items, len(paths)), strict=True)):
        if not part.documents:
            raise EvaluationError(f"task '{paths[position].stem}' has no {split} items to look at")
        order = sorted((digest([seed, name]), item) for item, name in enumerate(part.documents))
        drawn += [(mark, position, item) for mark, item in order[:share]]
    drawn.sort()
    return ClassifierItems(
        torch.stack([tables[position].inputs[item] for _, position, item in drawn]),
        torch.stack([tables[position].targets[item] for _, position, item in drawn]),
        tuple(tables[position].documents[item] for _, position, item in drawn),
        tuple(table.heads[0] for table in tables),
        tuple(position for _, position, _ in drawn),
    )

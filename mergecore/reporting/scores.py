"""What a sweep has measured, as plain data: read from the store by `run.collect`, shown by `report` and by MLflow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mergecore.reporting.scales import Scale

Kind = Literal["base", "expert", "multitask", "merge"]
Status = Literal["done", "pending", "failed", "refused"]


@dataclass(frozen=True)
class Suite:
    """How tasks are grouped: category → tasks for held-in and held-out; `trained_for`: expert → its held-in tasks."""

    held_in: Mapping[str, tuple[str, ...]]
    held_out: Mapping[str, tuple[str, ...]]
    trained_for: Mapping[str, tuple[str, ...]]

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks, held-in ones first, each once."""
        sides = self.held_in, self.held_out
        return tuple(dict.fromkeys(task for side in sides for tasks in side.values() for task in tasks))


@dataclass(frozen=True)
class CellScores:
    """One cell (one model) and what is known of it.

    cell: its id (stable across extensions of the spec). method, values: '' and {} for baselines; `values` holds the
    method's parameters that the spec gave. subset: −1 for baselines. experts: names, in the order of the spec.
    items: split → task → one score per item (float64, same items in the same order for every cell).
    model: key of the step that makes the model, `digest` of its content where it is known. `chosen`: this cell's
    values won on the validation items of its (method, count, subset), or there was nothing to choose.
    failure: path of the record with the traceback, for a cell that failed. folder: of its model, from the root of the
    store; '' where its weights are not kept. measured: seconds, peak bytes and the like;
    never part of any key. lineage: recipe and keys, JSON.
    """

    cell: str
    kind: Kind
    name: str
    method: str
    values: Mapping[str, Any]
    count: int
    subset: int
    experts: tuple[str, ...]
    status: Status
    reason: str
    chosen: bool
    model: str
    digest: str
    items: Mapping[str, Mapping[str, NDArray[np.float64]]]
    measured: Mapping[str, float] = field(default_factory=dict)
    lineage: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""
    folder: str = ""


@dataclass(frozen=True)
class Trial:
    """One thing that a search asked for. what: the experts or values that are its own. score: on validation items; None
    where it is not known, with the reason where it cannot be. kept: it was the best once its round was over. best: the
    largest score so far, its own included.
    """

    round: int
    cell: str
    what: str
    score: float | None
    kept: bool
    best: float | None
    reason: str = ""


@dataclass(frozen=True)
class Trajectory:
    """The way of one search, over the experts of one count and subset.

    state: 'open' while it asks for more, 'done', or 'stopped' where it ended early for `reason`. most: how many
    candidates it may ask for. result: the cell that it found, '' while there is none.
    """

    name: str
    method: str
    by: str
    count: int
    subset: int
    state: Literal["open", "done", "stopped"]
    reason: str
    most: int
    result: str
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Sweep:
    """A sweep by its name, its spec as YAML text, and all of its cells: baselines first."""

    name: str
    spec: str
    suite: Suite
    cells: tuple[CellScores, ...]
    select_by: str
    """What the best cell is chosen by: 'held_in' or 'held_out'."""
    registered: Mapping[str, Any] | None = None
    """The registration record: cell, model name, alias, uri, digest, and whether validation or test scores chose it."""
    searches: tuple[Trajectory, ...] = ()
    scales: Mapping[str, Scale] = field(default_factory=dict)
    """Task → how its score is shown, where that is not the mean over items."""
    chance: Mapping[str, float] = field(default_factory=dict)
    """Task → the score of guessing, as it is shown; subtracted before scores are divided."""

    @property
    def kept(self) -> Iterator[tuple[str, str, str]]:
        """(name of the cell, folder in the store, what it is) of each model that is kept, the registered one first."""
        if self.registered is not None:
            name = next(cell.name for cell in self.cells if cell.cell == self.registered["cell"])
            label = "@".join(filter(None, (self.registered["name"], self.registered["alias"])))
            folder = str(self.registered["uri"]).rstrip("/").rpartition("/")[2]
            yield name, f"registration/{folder}", f"registered as {label}: a whole folder"
        yield from ((cell.name, cell.folder, "its weights") for cell in self.cells if cell.folder)


def values_label(values: Mapping[str, Any]) -> str:
    """A method's values on one line: 'density=0.2, drop.rate=0.5'; '' where there are none."""
    return ", ".join(f"{path}={_plainly(value)}" for path, value in _leaves(values, ""))


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif not (key == "kind" and prefix):
            yield f"{prefix}{key}", value


def _plainly(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

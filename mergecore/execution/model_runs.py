"""Works out statistics on models in the current process: on one expert, or on all experts of a merge together."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergecore.checkpoints.experts import Expert
from mergecore.checkpoints.folded import FoldedTensors
from mergecore.errors import MismatchError, SpecError
from mergecore.events import silent
from mergecore.execution.outcome import RECORDED, Done, failed, made_with
from mergecore.execution.progress import DraftProgress, WrittenTensors
from mergecore.execution.scoring import RESIDENT_LOCK, Bench, opened_resident, resident
from mergecore.identity.keys import Step
from mergecore.planning.work import ModelWork
from mergecore.plugins.evaluator import Resident
from mergecore.plugins.model_statistic import LABELS_NOT_USED, Calibration, Slot, TaskInputs, Use
from mergecore.plugins.statistic import Statistics
from mergecore.store.results import commit_written, read_statistic, result_sink
from mergecore.store.store import Store
from mergecore.tensors.source import TensorSource


@dataclass(frozen=True)
class ModelTask:
    """A statistic on models. experts: in fold order. memory: bytes that it may take; None: whatever it takes."""

    work: ModelWork
    base: TensorSource
    experts: tuple[Expert, ...]
    companions: Path
    companions_digest: str
    memory: int | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        return (self.work.step,)


@dataclass(frozen=True)
class ResidentShell:
    """A resident's module as statistics see it. base: the checkpoint by whose names tensors go."""

    resident: Resident
    base: TensorSource

    @property
    def module(self) -> nn.Module:
        """The module."""
        return self.resident.model

    def swap(self, weights: TensorSource) -> None:
        """Put weights in."""
        self.resident.swap(weights)

    def slots(self, names: Iterable[str]) -> Mapping[str, Slot]:
        """Return where these tensors of the base lie in the module."""
        return self.resident.slots(self.base.tensors, tuple(names))


@dataclass
class OpenedModels:
    """Base, experts and shells. new: opens another shell; the first one stays in the process."""

    base: TensorSource
    experts: Sequence[TensorSource]
    memory: int | None
    config: Mapping[str, Any]
    most: int
    first: Callable[[], Resident]
    new: Callable[[], Resident]
    _shells: list[ResidentShell] = field(default_factory=list)

    def delta(self, expert: int, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements start … stop−1 of τ_t, flat, float32."""
        weights, base = (
            source.read(name, start, stop).to(torch.float32) for source in (self.experts[expert], self.base)
        )
        return weights - base

    def shell(self, number: int = 0) -> ResidentShell:
        """Return a shell. It is opened when first asked for."""
        if not 0 <= number < self.most:
            raise MismatchError(f"shell {number} is asked for, and the statistic says that it runs {self.most} models")
        while len(self._shells) <= number:
            self._shells.append(ResidentShell(self.new() if self._shells else self.first(), self.base))
        return self._shells[number]


@dataclass
class ExpertInputs:
    """What of the data belongs to one expert, drawn when it is asked for."""

    names: tuple[str, ...]
    use: Use
    shell: Callable[[], Resident]

    @cached_property
    def tasks(self) -> Sequence[TaskInputs]:
        """Its tasks, without answers."""
        use = self.use
        return self.shell().inputs(self.names, use.inputs, use.items, use.seed, use.labels == "used")

    @cached_property
    def answered(self) -> Calibration:
        """Training items whose sequences hold the right answer. Raises SpecError where labels are not used."""
        if self.use.labels == "none" or self.use.inputs != "training":
            raise SpecError(LABELS_NOT_USED)
        return self.shell().calibration(self.names, self.use.items, self.use.seed)


def run_on_models(bench: Bench, task: ModelTask) -> Done:
    """Work out one statistic on models, and record it. A try that was killed goes on from what it kept."""
    store, began, work = Store(bench.store), time.monotonic(), task.work
    with RESIDENT_LOCK:
        torch.set_num_threads(1)
        try:
            with store.draft(work.step, resume=True) as draft:
                if store.is_done(work.step, bytes_needed=True):
                    return Done()
                out = WrittenTensors(result_sink(draft.path, work.outputs), work.step.name)
                progress = DraftProgress(draft.path, out)
                if progress.last is None:
                    _empty(draft.path)
                    out.sink.prepare()
                numbers = _computed(bench, store, task, out, progress)
                out.check_whole()
                progress.forget()
                commit_written(store, draft, out.sink, numbers, made_with(began))
        except RECORDED as error:
            return failed(store, task.steps, error)
    return Done([work.step.name], {}, time.monotonic() - began)


def _computed(
    bench: Bench, store: Store, task: ModelTask, out: WrittenTensors, progress: DraftProgress
) -> Mapping[str, object]:
    work, statistic = task.work, task.work.statistic

    def first() -> Resident:
        return resident(bench, task.companions, task.companions_digest, dtype="float32")

    def new() -> Resident:
        return opened_resident(bench, task.companions, dtype="float32")

    weights = [FoldedTensors(task.base, expert) for expert in task.experts]
    most = {"none": 0, "one": 1, "each": len(weights)}[statistic.shells]
    models = OpenedModels(task.base, weights, task.memory, work.config, most, first, new)
    inputs = [ExpertInputs(names, statistic.use, first) for names in work.tasks]
    known: Statistics = {
        name: [read_statistic(store, inner.step) for inner in inner_works] for name, inner_works in work.inputs.items()
    }
    return statistic.compute(models, inputs, work.selection, known, out, progress, silent)


def _empty(folder: Path) -> None:
    """Remove what an earlier try left that cannot be gone on from."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()

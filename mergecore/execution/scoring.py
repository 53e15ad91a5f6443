"""Scores models in the current process, and keeps the shell in which they run."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from pyarrow import parquet

from mergecore.checkpoints.sources.digests import file_sha256
from mergecore.errors import EvaluationError, PluginError
from mergecore.events import silent
from mergecore.execution.outcome import RECORDED, Done, failed, made_with
from mergecore.identity.keys import Step
from mergecore.plugins.evaluator import Evaluator, Resident, Split, TaskIdentity
from mergecore.plugins.own_code import OwnCode
from mergecore.store.results import ITEMS
from mergecore.store.store import State, Store
from mergecore.tensors.source import TensorSource

Scored = tuple[Split, TaskIdentity, Step]
"""What is measured: the split, the task, and the step that records its scores."""

_RESIDENTS: dict[tuple[str, str, str, str], Resident] = {}
RESIDENT_LOCK = threading.Lock()


@dataclass(frozen=True)
class Bench:
    """What all tasks that run models share. It is sent to a worker once."""

    store: Path
    evaluator: Evaluator
    tasks: Path | None
    device: str = "cpu"
    code: OwnCode = field(default_factory=OwnCode)


@dataclass(frozen=True)
class ScoreTask:
    """One model, and the tasks on which it is scored. model: the step that made it; None for a checkpoint."""

    weights: TensorSource
    companions: Path
    companions_digest: str
    tasks: tuple[Scored, ...]
    model: Step | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(step for _, _, step in self.tasks)


def resident(bench: Bench, companions: Path, companions_digest: str, dtype: str | None = None) -> Resident:
    """Return the process's shell for these companions. It is opened once; another one is let go first."""
    key = (repr(_in_dtype(bench, dtype)), str(bench.tasks), str(bench.code), companions_digest)
    if key not in _RESIDENTS:
        _RESIDENTS.clear()
        _RESIDENTS[key] = opened_resident(bench, companions, dtype)
    return _RESIDENTS[key]


def opened_resident(bench: Bench, companions: Path, dtype: str | None = None) -> Resident:
    """Return a new shell, which the process does not keep."""
    bench.code.ready()
    evaluator = _in_dtype(bench, dtype)
    try:
        shell = evaluator.open(companions, bench.tasks)
    except ImportError as error:
        raise PluginError(
            f"evaluate: '{evaluator.name}' needs a module that cannot be imported here ({error}); install it where "
            "scoring runs and start again: nothing was recorded as failed"
        ) from error
    shell.model.to(bench.device)
    return shell


def _in_dtype(bench: Bench, dtype: str | None) -> Evaluator:
    if dtype is None or "dtype" not in type(bench.evaluator).model_fields:
        return bench.evaluator
    return bench.evaluator.model_copy(update={"dtype": dtype})


def score_model(bench: Bench, task: ScoreTask) -> Done:
    """Score one model on its tasks. Each task is recorded as soon as it is done."""
    store, done, began = Store(bench.store), Done(), time.monotonic()
    with RESIDENT_LOCK:
        torch.set_num_threads(1)
        try:
            shell = resident(bench, task.companions, task.companions_digest)
            shell.swap(task.weights)
        except RECORDED as error:
            if task.model is not None and store.state(task.model) is not State.PRESENT:
                return done  # another run of the sweep has measured and dropped it meanwhile
            return failed(store, task.steps, error)
        for _, identity, step in task.tasks:
            try:
                if _score_task(store, shell, identity, step):
                    done.steps.append(step.name)
            except RECORDED as error:
                done = done.note(failed(store, [step], error))
    done.seconds = time.monotonic() - began
    return done


def _score_task(store: Store, shell: Resident, identity: TaskIdentity, step: Step) -> bool:
    """Score one task and record it. Return False where another process has done so meanwhile."""
    began = time.monotonic()
    with store.draft(step) as draft:
        if store.is_done(step):
            return False
        table = shell.score(identity, silent)
        scores = table.column("score").to_pylist()
        if not scores:
            raise EvaluationError(f"task '{identity.task}' has no items in its {identity.split} split")
        parquet.write_table(table, draft.path / ITEMS, compression="zstd")
        digest = file_sha256(draft.path / ITEMS)
        result = {"task": identity.task, "split": identity.split, "metric": identity.metric, "score": fmean(scores),
                  "items": len(scores), "identity": dict(identity.identity)}  # fmt: skip
        store.commit(draft, digest, result, made_with(began))
    return True

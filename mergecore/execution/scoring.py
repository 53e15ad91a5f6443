"""Models on data, in the process it is called in: scores, and statistics that run an expert."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from pyarrow import parquet

from mergecore.checkpoints.experts import Expert
from mergecore.checkpoints.folded import FoldedTensors
from mergecore.checkpoints.sources.digests import file_sha256
from mergecore.errors import EvaluationError
from mergecore.events import silent
from mergecore.execution.outcome import RECORDED, Done, failed, made_with
from mergecore.identity.keys import Step
from mergecore.planning.plans import StatisticPlan
from mergecore.plugins.evaluator import Evaluator, Resident, Split, TaskIdentity
from mergecore.plugins.statistic import DataStatistic
from mergecore.store.results import ITEMS, commit_result
from mergecore.store.store import Store
from mergecore.tensors.source import TensorSource

_RESIDENTS: dict[tuple[str, str], Resident] = {}
_RESIDENT_LOCK = threading.Lock()


@dataclass(frozen=True)
class Bench:
    """What every scoring or data statistic of a sweep shares; sent to a worker once."""

    store: Path
    evaluator: Evaluator
    tasks: Path | None
    device: str = "cpu"


@dataclass(frozen=True)
class ScoreTask:
    """One model and the tasks on which it is to be scored."""

    weights: TensorSource
    companions: Path
    companions_digest: str
    tasks: tuple[tuple[Split, TaskIdentity, Step], ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        """What is to be completed."""
        return tuple(step for _, _, step in self.tasks)


@dataclass(frozen=True)
class DataTask:
    """One expert and the statistic that is to be worked out on its training items."""

    plan: StatisticPlan
    base: TensorSource
    expert: Expert
    companions: Path
    companions_digest: str

    @property
    def steps(self) -> tuple[Step, ...]:
        """What is to be completed."""
        return (self.plan.step,)


def resident(bench: Bench, companions: Path, companions_digest: str, dtype: str | None = None) -> Resident:
    """The model shell of this process for these companions, opened once. Another one is let go first."""
    evaluator = bench.evaluator
    if dtype is not None and "dtype" in type(evaluator).model_fields:
        evaluator = evaluator.model_copy(update={"dtype": dtype})
    key = (str(evaluator.parameters()), companions_digest)
    if key not in _RESIDENTS:
        _RESIDENTS.clear()
        _RESIDENTS[key] = evaluator.open(companions, bench.tasks)
        _RESIDENTS[key].model.to(bench.device)
    return _RESIDENTS[key]


def score_model(bench: Bench, task: ScoreTask) -> Done:
    """Score one model on its tasks, in the process it is called in; each task is recorded as soon as it is done."""
    store, done, began = Store(bench.store), Done(), time.monotonic()
    with _RESIDENT_LOCK:
        torch.set_num_threads(1)
        try:
            held = resident(bench, task.companions, task.companions_digest)
            held.swap(task.weights)
        except RECORDED as error:
            return failed(store, task.steps, error)
        for _, identity, step in task.tasks:
            try:
                if _score_task(store, held, identity, step):
                    done.steps.append(step.name)
            except RECORDED as error:
                done = done.note(failed(store, [step], error))
    done.seconds = time.monotonic() - began
    return done


def _score_task(store: Store, held: Resident, identity: TaskIdentity, step: Step) -> bool:
    """Score one task and record it. False where another process has done so meanwhile."""
    began = time.monotonic()
    with store.draft(step) as draft:
        if store.is_done(step):
            return False
        table = held.score(identity, silent)
        scores = table.column("score").to_pylist()
        if not scores:
            raise EvaluationError(f"task '{identity.task}' has no items in its {identity.split} split")
        parquet.write_table(table, draft.path / ITEMS, compression="zstd")
        digest = file_sha256(draft.path / ITEMS)
        result = {"task": identity.task, "split": identity.split, "metric": identity.metric, "score": fmean(scores),
                  "items": len(scores), "identity": dict(identity.identity)}  # fmt: skip
        store.commit(draft, digest, result, made_with(began))
    return True


def find_on_data(bench: Bench, task: DataTask) -> Done:
    """Work out one data statistic in the process it is called in."""
    store, began, plan = Store(bench.store), time.monotonic(), task.plan
    assert isinstance(plan.statistic, DataStatistic)
    with _RESIDENT_LOCK:
        torch.set_num_threads(1)
        try:
            with store.draft(plan.step) as draft:
                if store.is_done(plan.step, bytes_needed=True):
                    return Done()
                held = resident(bench, task.companions, task.companions_digest, dtype="float32")
                held.swap(FoldedTensors(task.base, task.expert))
                samples = int(getattr(plan.statistic, "samples", 0))
                data = held.calibration(plan.tasks, samples, int(getattr(plan.statistic, "seed", 0)))
                result = plan.statistic.compute(held.model, data, plan.selection, silent)
                commit_result(store, draft, result, made_with(began))
        except RECORDED as error:
            return failed(store, task.steps, error)
    return Done([plan.step.name], {}, time.monotonic() - began)

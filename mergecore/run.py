"""The only place where a step is done: in a notebook, on the command line and in a Prefect task alike.

Each function completes the work it is given through an `Executor`, records it in the store and returns what was done
and what failed. A failure is recorded with its reason and never stops the rest.
"""

from __future__ import annotations

import contextlib
import platform
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch
from pyarrow import parquet
from torch import Tensor

from mergecore.adapter_files import write_config, write_made
from mergecore.adapters import AdapterMethod, adapter_config
from mergecore.delta import AdapterExpert, Expert, FullExpert
from mergecore.engine import run_pass
from mergecore.errors import EvaluationError, MergeloomError, ServiceError
from mergecore.evaluators import Evaluator, Resident, Split, TaskIdentity
from mergecore.events import Event, Report, silent
from mergecore.folded import FoldedSnapshot
from mergecore.frontier import Scoring
from mergecore.identity import Step, block_digests, model_digest, tensor_digest
from mergecore.kernels.library import Library
from mergecore.method import DataStatistic, Found, Link, Result, Statistic, TensorInfo, TensorSource
from mergecore.passes import Executor, MergeJob, PassOutcome, PassPlan, StatisticJob, coarsest, plan_spans
from mergecore.plan import MergePlan, StatisticPlan
from mergecore.pool import Pool, opened, snapshot_step
from mergecore.product import task_model
from mergecore.snapshot import NAMES, FileTensors, MemoryTensors, Snapshot, open_file, open_files
from mergecore.store import Draft, State, Store
from mergecore.writer import ShardSink, plan_shards

TENSORS = "tensors.safetensors"
Planned = TypeVar("Planned", bound=Any)
ITEMS = "items.parquet"
RECORDED = (MergeloomError, ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)
"""What is recorded as the failure of a step, and does not stop the others: our own errors, and those that a plug-in or
torch (out of memory, say) may raise. Not among them: errors of the system, interruption, cancelling."""


def reason(error: BaseException) -> str:
    """Why a step failed, for its record: our own errors are sentences, others need their kind said."""
    return str(error) if isinstance(error, MergeloomError) else f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Place:
    """Where work is done: the store, who runs spans and scores, where progress goes, and where checkpoints lie."""

    pool: Pool
    store: Store
    executor: Executor
    report: Report
    shard_size: int
    evaluator: Evaluator | None = None
    tasks: Path | None = None
    """Folder of task files."""
    folders: dict[str, Path] = field(default_factory=dict)
    """Weights digest → local folder, filled by `fetch`."""
    device: str = "cpu"
    library: Library | None = None
    """Where fused loops are kept."""
    memory: int | None = None
    """Bytes that the blocks of a pass may take; None: whatever they take."""

    @property
    def bench(self) -> Bench:
        """What scoring and statistics on data share."""
        if self.evaluator is None:
            raise EvaluationError("nothing here says how models are evaluated; run this from a spec with `evaluate:`")
        return Bench(self.store.root, self.evaluator, self.tasks, self.device)


@dataclass
class Done:
    """What a piece of work completed: names of steps done in it (none of what others had done before), and {name: reason}
    of those that failed."""

    steps: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def note(self, other: Done) -> Done:
        """Both together."""
        return Done(self.steps + other.steps, {**self.failures, **other.failures}, self.seconds + other.seconds)


def fetch(place: Place, snapshot: Snapshot) -> Done:
    """Have a checkpoint's files at hand, and record what it is."""
    began = time.monotonic()
    folder = snapshot.source.fetch(place.report)
    if isinstance(snapshot, FoldedSnapshot):
        snapshot.adapter.source.fetch(place.report)
    place.folders[snapshot.weights] = folder
    step = snapshot_step(snapshot)
    if place.store.is_done(step):
        return Done([], {}, time.monotonic() - began)
    with place.store.draft(step) as draft:
        files = {name: [held.size, held.sha256] for name, held in sorted(snapshot.source.files.items())}
        result = {"uri": snapshot.source.uri, "revision": snapshot.source.revision, "files": files}
        place.store.commit(draft, snapshot.weights, result, made_with(began))
    return Done([step.name], {}, time.monotonic() - began)


def run_statistics(place: Place, plans: Sequence[StatisticPlan]) -> Done:
    """Complete streamed statistics in one reading of the models, and links of chains in another; where one fails they are
    tried one by one. Adapters are made one by one, spread over all workers."""

    def attempt(held: Sequence[StatisticPlan]) -> list[str]:
        began = time.monotonic()
        with _drafts(place.store, [plan.step for plan in held]) as drafts:
            wanted = [plan for plan in held if plan.step in drafts]
            for group in _by_base(wanted):
                outcome = run_pass(_pass(place, group, [], []), place.executor, place.report)
                for plan in group:
                    commit_result(place.store, drafts[plan.step], outcome.results[plan.step.key], made_with(began))
        return [plan.step.name for plan in wanted]

    links = [plan for plan in plans if isinstance(plan.statistic, Link)]
    adapters = [plan for plan in plans if isinstance(plan.statistic, AdapterMethod)]
    streamed = [plan for plan in plans if isinstance(plan.statistic, Statistic)]
    done = _each_or_alone(place, streamed, attempt) if streamed else Done()
    if links:
        done = done.note(_write(place, [link.written() for link in links], _commit_link))
    return done.note(run_adapters(place, adapters)) if adapters else done


def run_merges(place: Place, plans: Sequence[MergePlan]) -> Done:
    """Complete merges in one reading of the models; what spans an earlier try has finished are not done again."""
    return _write(place, plans, _commit_model)


Commit = Callable[[Place, MergePlan, Draft, PassOutcome, Mapping[str, Any]], None]
"""Records what a pass has written of one plan."""


def _write(place: Place, plans: Sequence[MergePlan], commit: Commit) -> Done:
    def attempt(held: Sequence[MergePlan]) -> list[str]:
        began = time.monotonic()
        with _drafts(place.store, [plan.step for plan in held], resume=True) as drafts:
            wanted = [plan for plan in held if plan.step in drafts]
            ways = [way for plan in wanted for way in _ways(place, plan, drafts[plan.step])]
            written = PassOutcome()
            for group in _by_base(ways, lambda way: way.plan.base):
                outcome = run_pass(_pass(place, [], [way.plan for way in group], group), place.executor, place.report)
                for way in group:
                    written.tensors.setdefault(way.model, {}).update(outcome.tensors[way.plan.step.key])
            for way in ways:
                shutil.rmtree(way.journals, ignore_errors=True)
            for plan in wanted:
                held_here = written.tensors[plan.step.key]
                written.models[plan.step.key] = model_digest(
                    {name: (info.dtype, info.shape, held_here[name]) for name, info in plan.outputs.items()}
                )
                commit(place, plan, drafts[plan.step], written, made_with(began))
        return [plan.step.name for plan in wanted]

    return _each_or_alone(place, plans, attempt)


def _each_or_alone(place: Place, plans: Sequence[Any], attempt: Callable[[Sequence[Any]], list[str]]) -> Done:
    """All in one pass; if that fails, each alone, so that only the culprit is recorded as failed."""
    began = time.monotonic()
    try:
        return Done(attempt(plans), {}, time.monotonic() - began)
    except RECORDED as error:
        if len(plans) == 1:
            place.store.fail(plans[0].step, reason(error))
            return Done([], {plans[0].step.name: reason(error)}, time.monotonic() - began)
    done = Done()
    for plan in plans:
        done = done.note(_each_or_alone(place, [plan], attempt))
    return done


@contextlib.contextmanager
def _drafts(store: Store, steps: Sequence[Step], resume: bool = False) -> Iterator[dict[Step, Draft]]:
    """Drafts of the steps that are still missing once their locks are held (taken in order of key: no deadlock)."""
    with contextlib.ExitStack() as stack:
        held: dict[Step, Draft] = {}
        for step in sorted(steps, key=lambda step: step.key):
            draft = stack.enter_context(store.draft(step, resume))
            if store.state(step) is not State.PRESENT:
                held[step] = draft
        yield held


@dataclass(frozen=True)
class _Way:
    """One part of a model that is being made: its plan, the key of the model, and what all of its parts write into."""

    plan: MergePlan
    model: str
    sink: ShardSink
    journals: Path

    @property
    def journal(self) -> Path:
        """Where its own spans are noted."""
        return self.journals / self.plan.step.key[:24] if self.plan.step.key != self.model else self.journals


def _ways(place: Place, plan: MergePlan, draft: Draft) -> list[_Way]:
    """The parts of a model, over one sink; what an earlier try has written for other shards is removed."""
    link = isinstance(plan.method, Link)
    shards = (
        plan_shards(plan.outputs, sys.maxsize, Path(TENSORS).stem)
        if link
        else plan_shards(plan.outputs, place.shard_size)
    )
    sink = ShardSink(draft.path, dict(plan.outputs), shards)
    held = list(draft.path.glob("journal-*"))
    if len(held) != 1 or not sink.complete():
        for path in draft.path.iterdir():  # files too: they may be those of another shard size
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        # A name of its own: a worker still busy with a pass that was called off can then not take this one's word.
        held = [draft.path / f"journal-{uuid.uuid4().hex[:12]}"]
    found = [_Way(way, plan.step.key, sink, held[0]) for way in plan.ways]
    for way in found:
        way.journal.mkdir(parents=True, exist_ok=True)
    return found


def _by_base(plans: Sequence[Planned], base: Callable[[Planned], str] = lambda plan: plan.base) -> list[list[Planned]]:
    """The plans that count changes from one base, together: a pass has one."""
    groups: dict[str, list[Planned]] = {}
    for plan in plans:
        groups.setdefault(base(plan), []).append(plan)
    return list(groups.values())


def _pass(
    place: Place, statistics: Sequence[StatisticPlan], merges: Sequence[MergePlan], ways: Sequence[_Way]
) -> PassPlan:
    """What the engine needs: the pool's experts once each, every job's share of them, and the spans. All have one base."""
    base, experts = opened(place.pool, place.folders)
    asked: list[StatisticPlan | MergePlan] = [*statistics, *merges]
    ids = sorted({one for plan in asked for one in plan.experts})
    position = {one: number for number, one in enumerate(ids)}
    statistic_jobs = tuple(
        StatisticJob(
            plan.step.key,
            plan.statistic,
            tuple(position[one] for one in plan.experts),
            plan.selection,
            read_inputs(place.store, plan.inputs),
        )
        for plan in statistics
        if isinstance(plan.statistic, Statistic)
    )
    merge_jobs = tuple(_merge_job(place, way, position) for way in ways)
    read = dict[str, TensorInfo]()
    for job in statistic_jobs:
        read.update(job.selection)
    for merge in merges:
        read.update({**merge.layout.merged, **merge.layout.copied})
    spans = plan_spans(read, coarsest([plan.method for plan in merges]))
    instead = experts[asked[0].base] if asked[0].base else None
    ground = instead.held if isinstance(instead, FullExpert) else base
    return PassPlan(
        ground,
        tuple(experts[one] for one in ids),
        merge_jobs,
        statistic_jobs,
        spans,
        place.device,
        place.library,
        place.memory,
        place.pool.base.weights,
    )


def _merge_job(place: Place, way: _Way, position: Mapping[str, int]) -> MergeJob:
    plan = way.plan
    return MergeJob(
        plan.step.key,
        plan.method,
        tuple(position[one] for one in plan.experts) if plan.method.needs_experts else (),
        frozenset(plan.layout.merged),
        dict(plan.outputs),
        read_inputs(place.store, plan.statistics),
        way.sink,
        way.journal,
    )


def _commit_model(place: Place, plan: MergePlan, draft: Draft, outcome: PassOutcome, made: Mapping[str, Any]) -> None:
    key = plan.step.key
    earlier, tensors = place.store.record(plan.step), outcome.tensors[key]
    held = {name: [info.dtype, list(info.shape), tensors[name]] for name, info in sorted(plan.outputs.items())}
    result = {"tensors": held, "bytes": plan.size, "dropped": dict(plan.layout.dropped), **_kept(place.store, plan)}
    place.store.commit(draft, outcome.models[key], result, made)
    if earlier is not None and earlier.digest != outcome.models[key]:
        place.report(
            Event(f"{plan.step.name} was made again and differs from what is on record (other library or device?)")
        )


def _commit_link(place: Place, plan: MergePlan, draft: Draft, outcome: PassOutcome, made: Mapping[str, Any]) -> None:
    assert isinstance(plan.method, Link)
    known = read_inputs(place.store, plan.statistics)
    numbers = plan.method.numbers(open_file(draft.path / TENSORS), plan.layout.merged, known)
    place.store.commit(draft, outcome.models[plan.step.key], numbers, made)


def _kept(store: Store, plan: MergePlan) -> dict[str, Any]:
    """The share of each task vector that its threshold really keeps, by expert."""
    kept = {}
    for found in () if plan.parts else plan.statistics.get("threshold", ()):
        record = store.record(found.step)
        if record is not None:
            kept[found.experts[0]] = record.result["density"]
    return {"kept_density": kept} if kept else {}


# --- statistics' results ------------------------------------------------------------------------------------------


def commit_result(store: Store, draft: Draft, result: Result, made: Mapping[str, Any]) -> None:
    """Write a statistic's tensors and numbers and record them under their digest."""
    tensors = result.tensors
    if tensors:
        infos = {name: TensorInfo(NAMES[value.dtype], tuple(value.shape)) for name, value in tensors.items()}
        # Not safetensors' own writer: that one leaves files that only their owner may read.
        sink = ShardSink(draft.path, infos, plan_shards(infos, sys.maxsize, Path(TENSORS).stem))
        sink.prepare()
        for name, value in tensors.items():
            sink.write(name, 0, value.reshape(-1))
    held = {
        name: (
            NAMES[value.dtype],
            tuple(value.shape),
            tensor_digest(list(block_digests(value.reshape(-1)).values())),
        )
        for name, value in tensors.items()
    }
    store.commit(draft, model_digest(held), result.numbers, made)


def read_inputs(store: Store, inputs: Mapping[str, tuple[StatisticPlan, ...]]) -> dict[str, list[Found]]:
    """What a method or statistic must know beforehand, from the store."""
    return {name: [read_found(store, plan) for plan in plans] for name, plans in inputs.items()}


def read_found(store: Store, plan: StatisticPlan) -> Found:
    """One statistic's result, its tensors read when they are asked for."""
    record = store.record(plan.step)
    if record is None:
        raise MergeloomError(f"statistic {plan.step.name} is asked for before it was worked out")
    held = next((name for name in record.files if name.endswith(".safetensors")), None)
    tensors: TensorSource = MemoryTensors({}) if held is None else open_file(store.folder(plan.step) / held)
    return Found(tensors, record.result)


# --- adapters -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterTask:
    """An adapter to be made; base and configs are what its own configuration is written from."""

    plan: StatisticPlan
    experts: tuple[AdapterExpert, ...]
    base: Mapping[str, TensorInfo]
    configs: tuple[Mapping[str, Any], ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        """What is to be completed."""
        return (self.plan.step,)


def run_adapters(place: Place, plans: Sequence[StatisticPlan]) -> Done:
    """Make adapters of adapters."""
    members, base = {member.id: member for member in place.pool.members}, place.pool.base.tensors
    tasks = [
        AdapterTask(
            plan,
            tuple(members[one].adapter(place.folders[one], base) for one in plan.experts),
            base,
            tuple(members[one].snapshot.config for one in plan.experts),
        )
        for plan in plans
    ]
    return _gather(place, make_adapter, place.store.root, tasks, [plan.step.name for plan in plans], "adapters made")


def make_adapter(root: Path, task: AdapterTask) -> Done:
    """Make one adapter in the process it is called in: its two files, written module by module."""
    store, plan, began = Store(root), task.plan, time.monotonic()
    torch.set_num_threads(1)
    try:
        with store.draft(plan.step) as draft:
            if store.is_done(plan.step, bytes_needed=True):
                return Done()
            assert isinstance(plan.statistic, AdapterMethod)
            digest, numbers = write_made(draft.path, plan.statistic, task.experts, plan.selection)
            write_config(
                draft.path, adapter_config(numbers["ranks"], task.base, task.configs, numbers["fan_in_fan_out"])
            )
            store.commit(draft, digest, numbers, made_with(began))
    except RECORDED as error:
        return _failed(store, task.steps, error)
    return Done([plan.step.name], {}, time.monotonic() - began)


# --- models on data -----------------------------------------------------------------------------------------------

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


@dataclass(frozen=True)
class Folded:
    """An expert as a model: its weights in float32, an adapter folded into the base."""

    base: TensorSource
    expert: Expert

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The base's tensors."""
        return self.base.tensors

    def read(self, name: str, start: int = 0, stop: int | None = None, space: Tensor | None = None) -> Tensor:
        """Elements of θ_t, integers as they are; what the expert does not carry is the base's."""
        stop = self.base.tensors[name].count if stop is None else stop
        held = self.base.read(name, start, stop)
        if not self.expert.carries(name):
            return held
        own = self.expert.block(name, start, stop)
        # Counters of a BatchNorm and the like are integers, in the model too.
        return self.expert.weights(own, held.to(torch.float32)) if own.is_floating_point() else own


def run_scorings(place: Place, scorings: Sequence[Scoring]) -> Done:
    """Score models, one after another on each worker; a model's tasks stay together."""
    tasks, names = [], []
    for scoring in scorings:
        companions = place.pool.base
        weights: TensorSource
        if scoring.cell.loads:
            found = _product_tasks(place, scoring)
            tasks += found
            names += [scoring.cell.name] * len(found)
            continue
        if scoring.cell.merge is not None:
            weights = open_model(place.store, scoring.cell.model)
        else:
            if scoring.cell.member is not None:
                companions = scoring.cell.member.snapshot
            weights = companions.open(place.folders[companions.weights])
        tasks.append(ScoreTask(weights, place.folders[companions.weights], companions.companions, scoring.tasks))
        names.append(scoring.cell.name)
    return _gather(place, score_model, place.bench, tasks, names, "models scored")


def _product_tasks(place: Place, scoring: Scoring) -> list[ScoreTask]:
    """A product's scorings, one for each expert whose model is loaded from it."""
    merge, base = scoring.cell.merge, place.pool.base
    assert merge is not None
    weights, loads = open_model(place.store, merge.step), scoring.cell.loads
    return [
        ScoreTask(
            task_model(merge, weights, expert),
            place.folders[base.weights],
            base.companions,
            tuple(one for one in scoring.tasks if loads[one[1].task] == expert),
        )
        for expert in dict.fromkeys(loads[identity.task] for _, identity, _ in scoring.tasks)
    ]


def run_data_statistics(place: Place, plans: Sequence[StatisticPlan]) -> Done:
    """Work out statistics that run an expert on data."""
    base, experts = opened(place.pool, place.folders)
    ground = place.pool.base
    tasks = [
        DataTask(plan, base, experts[plan.experts[0]], place.folders[ground.weights], ground.companions)
        for plan in plans
    ]
    return _gather(place, find_on_data, place.bench, tasks, [plan.step.name for plan in plans], "statistics on data")


def _gather(
    place: Place,
    function: Callable[[Any, Any], Done],
    bench: Bench | Path,
    tasks: Sequence[Any],
    names: Sequence[str],
    what: str,
) -> Done:
    """All tasks, spread; where workers die at one of them those that are left are done alone, to find out at which."""
    done, left = Done(), dict(enumerate(tasks))
    place.report(Event(what, 0, len(tasks), "models"))
    try:
        for position, found in place.executor.each(function, bench, tasks):
            done = done.note(found)
            del left[position]
            place.report(Event(f"{what}: {names[position]}", len(tasks) - len(left), len(tasks), "models"))
    except ServiceError as error:
        if len(tasks) == 1:
            return _failed(place.store, tasks[0].steps, error)
        for position, task in left.items():
            done = done.note(_gather(place, function, bench, [task], [names[position]], what))
    return done


def _failed(store: Store, steps: Sequence[Step], error: Exception) -> Done:
    """The same reason recorded for all of these steps that are not done."""
    open_ones = [step for step in steps if not store.is_done(step)]
    for step in open_ones:
        store.fail(step, reason(error))
    return Done([], {step.name: reason(error) for step in open_ones})


def open_model(store: Store, step: Step) -> FileTensors:
    """The tensors of a model in the store."""
    record = store.record(step)
    names = [] if record is None else [name for name in record.files if name.endswith(".safetensors")]
    return open_files(store.folder(step), names)


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
            return _failed(store, task.steps, error)
        for _, identity, step in task.tasks:
            try:
                if _score_task(store, held, identity, step):
                    done.steps.append(step.name)
            except RECORDED as error:
                done = done.note(_failed(store, [step], error))
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
        digest = table_digest(draft.path / ITEMS)
        result = {"task": identity.task, "split": identity.split, "metric": identity.metric, "score": fmean(scores),
                  "items": len(scores), "identity": dict(identity.identity)}  # fmt: skip
        store.commit(draft, digest, result, made_with(began))
    return True


def table_digest(path: Path) -> str:
    """SHA-256 of a table's file."""
    from mergecore.sources.digests import file_sha256

    return file_sha256(path)


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
                held.swap(Folded(task.base, task.expert))
                samples = int(getattr(plan.statistic, "samples", 0))
                data = held.calibration(plan.tasks, samples, int(getattr(plan.statistic, "seed", 0)))
                result = plan.statistic.compute(held.model, data, plan.selection, silent)
                commit_result(store, draft, result, made_with(began))
        except RECORDED as error:
            return _failed(store, task.steps, error)
    return Done([plan.step.name], {}, time.monotonic() - began)


def made_with(began: float) -> dict[str, Any]:
    """How a result was made: never part of a key, always part of its record."""
    return {
        "seconds": round(time.monotonic() - began, 3),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def drop_models(place: Place, plans: Sequence[MergePlan | StatisticPlan]) -> None:
    """Free the bytes of models, and of links of chains, that nothing can ask for any more."""
    for plan in plans:
        place.store.drop(plan.step)


def snapshots_of(pool: Pool) -> list[Snapshot]:
    """Every checkpoint of the pool, the base first."""
    return [pool.base, *(member.snapshot for member in pool.members)]

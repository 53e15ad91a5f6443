"""The only place where a step is done: in a notebook, on the command line and in a Prefect task alike.

Each function completes the work it is given through an `Executor`, records it in the store and returns what was done
and what failed. A failure is recorded with its reason and never stops the rest.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mergecore.adapter_making import AdapterTask, make_adapter
from mergecore.adapters import AdapterMethod
from mergecore.delta import FullExpert
from mergecore.done import RECORDED, Done, failed, made_with, reason
from mergecore.engine import run_pass
from mergecore.errors import EvaluationError, ServiceError
from mergecore.evaluators import Evaluator
from mergecore.events import Event, Report
from mergecore.folded import FoldedSnapshot
from mergecore.frontier import Scoring
from mergecore.identity import Step, model_digest
from mergecore.kernels.library import Library
from mergecore.method import Link, Statistic, TensorInfo, TensorSource
from mergecore.on_data import ITEMS, Bench, DataTask, ScoreTask, find_on_data, score_model
from mergecore.passes import Executor, MergeJob, PassOutcome, PassPlan, StatisticJob, coarsest, plan_spans
from mergecore.plan import MergePlan, StatisticPlan
from mergecore.pool import Pool, opened, snapshot_step
from mergecore.product import task_model
from mergecore.results import TENSORS, commit_result, open_model, read_found, read_inputs
from mergecore.snapshot import Snapshot, open_file
from mergecore.store import Draft, State, Store
from mergecore.vocabulary.snapshot import RewrittenSource, as_it_lies
from mergecore.writer import ShardSink, plan_shards

__all__ = [
    "ITEMS", "Done", "Place", "ScoreTask", "drop_models", "fetch", "made_with", "read_found", "run_data_statistics",
    "run_merges", "run_scorings", "run_statistics", "snapshots_of",
]  # fmt: skip

Planned = TypeVar("Planned", bound=Any)


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


def fetch(place: Place, snapshot: Snapshot) -> Done:
    """Have a checkpoint's files at hand, and record what it is. Files that differ from those that lie there are the record's."""
    began, before = time.monotonic(), Done()
    if as_it_lies(snapshot) is not snapshot:
        before = fetch(place, as_it_lies(snapshot))
    folder = snapshot.source.fetch(place.report)
    if isinstance(snapshot, FoldedSnapshot):
        snapshot.adapter.source.fetch(place.report)
    step, rewritten = snapshot_step(snapshot), snapshot.source if isinstance(snapshot.source, RewrittenSource) else None
    if rewritten is not None:
        place.folders[snapshot.weights] = place.store.folder(step)
    else:  # the base may be an expert as well; whoever has the companions says where they lie
        place.folders.setdefault(snapshot.weights, folder)
    if place.store.is_done(step, bytes_needed=rewritten is not None):
        return before.note(Done([], {}, time.monotonic() - began))
    with place.store.draft(step) as draft:
        if rewritten is not None:
            rewritten.write(draft.path, snapshot.config)
        files = {name: [held.size, held.sha256] for name, held in sorted(snapshot.source.files.items())}
        result = {"uri": snapshot.source.uri, "revision": snapshot.source.revision, "files": files}
        place.store.commit(draft, snapshot.weights, result, made_with(began))
    return before.note(Done([step.name], {}, time.monotonic() - began))


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
                    written.tensors.setdefault(way.model, {}).update(outcome.tensors[way.key])
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
    def key(self) -> str:
        """What its job is called in a pass, where models may have parts in common."""
        return self.model if self.plan.step.key == self.model else f"{self.model}/{self.plan.step.key}"

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
        way.key,
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


def run_scorings(place: Place, scorings: Sequence[Scoring]) -> Done:
    """Score models, one after another on each worker; a model's tasks stay together."""
    tasks, names = [], []
    for scoring in scorings:
        companions = place.pool.base if scoring.cell.merge is not None else as_it_lies(place.pool.base)
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
                companions = as_it_lies(scoring.cell.member.snapshot)
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
            return failed(place.store, tasks[0].steps, error)
        for position, task in left.items():
            done = done.note(_gather(place, function, bench, [task], [names[position]], what))
    return done


def drop_models(place: Place, plans: Sequence[MergePlan | StatisticPlan]) -> None:
    """Free the bytes of models, and of links of chains, that nothing can ask for any more."""
    for plan in plans:
        place.store.drop(plan.step)


def snapshots_of(pool: Pool) -> list[Snapshot]:
    """Every checkpoint of the pool, the base first."""
    return [pool.base, *(member.snapshot for member in pool.members)]

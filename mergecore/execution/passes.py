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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mergecore.checkpoints.experts import FullExpert
from mergecore.engine.pass_plan import MergeJob, PassOutcome, PassPlan, StatisticJob, coarsest, plan_spans
from mergecore.engine.run_pass import run_pass
from mergecore.events import Event
from mergecore.execution.outcome import RECORDED, Done, made_with, reason
from mergecore.execution.place import Place
from mergecore.execution.spread import run_adapters
from mergecore.identity.content import model_digest
from mergecore.identity.keys import Step
from mergecore.planning.plans import MergePlan, StatisticPlan, steps_of
from mergecore.planning.pool import opened
from mergecore.plugins.adapter_method import AdapterMethod
from mergecore.plugins.chain import Link
from mergecore.plugins.statistic import Statistic
from mergecore.store.results import TENSORS, commit_result, read_inputs
from mergecore.store.store import Draft, State, Store
from mergecore.tensors.files import open_file
from mergecore.tensors.sinks import ShardSink, plan_shards
from mergecore.tensors.source import TensorInfo

Planned = TypeVar("Planned", bound=Any)


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
            read_inputs(place.store, steps_of(plan.inputs)),
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
        read_inputs(place.store, steps_of(plan.statistics)),
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
    known = read_inputs(place.store, steps_of(plan.statistics))
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

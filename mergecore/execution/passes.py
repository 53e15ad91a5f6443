"""Carries out the works that read models: statistics that are streamed, and tensors that are written.

Many works share one pass. Each is recorded in the store by itself. A failure is recorded with its reason and stops
nothing else.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mergecore.checkpoints.experts import FullExpert
from mergecore.engine.pass_plan import MergeJob, PassPlan, StatisticJob, coarsest, plan_spans
from mergecore.engine.run_pass import run_pass
from mergecore.events import Event
from mergecore.execution.outcome import RECORDED, Done, failed, made_with
from mergecore.execution.place import Place
from mergecore.execution.tensor_ids import drawn_with, with_tensors_ids
from mergecore.identity.content import model_digest
from mergecore.identity.keys import Step
from mergecore.planning.pool import opened
from mergecore.planning.work import LinkWork, MergeWork, ScanWork, Way, Work
from mergecore.plugins.statistic import Found
from mergecore.store.results import commit_result, read_statistic
from mergecore.store.store import Draft, State, Store
from mergecore.store.verified import write_digests
from mergecore.tensors.sinks import ShardSink
from mergecore.tensors.source import TensorInfo

SomeWork = TypeVar("SomeWork", bound=Work)
Item = TypeVar("Item")


def run_scans(place: Place, works: Sequence[ScanWork]) -> Done:
    """Complete streamed statistics in one reading of the models. Where that fails, try them one by one."""

    def attempt(asked: Sequence[ScanWork]) -> list[str]:
        began = time.monotonic()
        with _drafts(place.store, [work.step for work in asked]) as drafts:
            open_works = [work for work in asked if work.step in drafts]
            for group in _grouped(open_works, lambda work: work.base):
                outcome = run_pass(_scanning(place, group), place.executor, place.report)
                for work in group:
                    commit_result(place.store, drafts[work.step], outcome.results[work.step.key], made_with(began))
        return [work.step.name for work in open_works]

    return _each_or_alone(place, works, attempt)


def run_written(place: Place, works: Sequence[MergeWork | LinkWork]) -> Done:
    """Complete models and links in one reading of the models. Spans that an earlier try finished are not done again."""

    def attempt(asked: Sequence[MergeWork | LinkWork]) -> list[str]:
        began = time.monotonic()
        with _drafts(place.store, [work.step for work in asked], resume=True) as drafts:
            open_works = [work for work in asked if work.step in drafts]
            parts = [part for work in open_works for part in _parts(place, work, drafts[work.step])]
            digests: dict[str, dict[str, str]] = {}
            blocks: dict[str, dict[str, list[str]]] = {}
            for group in _grouped(parts, lambda part: part.way.base):
                outcome = run_pass(_writing(place, group), place.executor, place.report)
                for part in group:
                    digests.setdefault(part.model, {}).update(outcome.tensors[part.key])
                    blocks.setdefault(part.model, {}).update(outcome.blocks[part.key])
            for part in parts:
                shutil.rmtree(part.journals, ignore_errors=True)
            for work in open_works:
                write_digests(drafts[work.step].path, blocks[work.step.key])
                _commit(place, work, drafts[work.step], digests[work.step.key], began)
        return [work.step.name for work in open_works]

    return _each_or_alone(place, works, attempt)


def _commit(place: Place, work: MergeWork | LinkWork, draft: Draft, digests: Mapping[str, str], began: float) -> None:
    """Record what was written, and say so where the bytes differ from those on record."""
    store = place.store
    digest = model_digest({name: (info.dtype, info.shape, digests[name]) for name, info in work.outputs.items()})
    earlier = store.record(work.step)

    def results(step: Step) -> Found:
        return read_statistic(store, step)

    record = {**work.record(draft.path, digests, results), **drawn_with(place, work.ways)}
    store.commit(draft, digest, record, made_with(began))
    if earlier is not None and earlier.digest != digest:
        place.report(
            Event(f"{work.step.name} was made again and differs from what is on record (other library or device?)")
        )


def _each_or_alone(place: Place, works: Sequence[SomeWork], attempt: Callable[[Sequence[SomeWork]], list[str]]) -> Done:
    """Try all in one pass. If that fails, try each alone, so that only the culprit is recorded as failed."""
    began = time.monotonic()
    try:
        return Done(attempt(works), {}, time.monotonic() - began)
    except RECORDED as error:
        if len(works) == 1:
            return failed(place.store, [works[0].step], error).lasting(time.monotonic() - began)
    done = Done()
    for work in works:
        done = done.note(_each_or_alone(place, [work], attempt))
    return done


@contextlib.contextmanager
def _drafts(store: Store, steps: Sequence[Step], resume: bool = False) -> Iterator[dict[Step, Draft]]:
    """Lock the steps in order of their keys (no deadlock), and yield drafts of those that are still missing."""
    with contextlib.ExitStack() as stack:
        drafts: dict[Step, Draft] = {}
        for step in sorted(steps, key=lambda step: step.key):
            draft = stack.enter_context(store.draft(step, resume))
            if store.state(step) is not State.PRESENT:
                drafts[step] = draft
        yield drafts


@dataclass(frozen=True)
class _Part:
    """One way of a model that is being written. model: key of the model. All ways of a model write into one sink."""

    way: Way
    model: str
    sink: ShardSink
    journals: Path

    @property
    def key(self) -> str:
        """The name of its job in a pass. Models may have ways in common, so the model's key is part of it."""
        return self.model if self.way.step.key == self.model else f"{self.model}/{self.way.step.key}"

    @property
    def journal(self) -> Path:
        """The folder in which its finished spans are noted."""
        return self.journals / self.way.step.key[:24] if self.way.step.key != self.model else self.journals


def _parts(place: Place, work: MergeWork | LinkWork, draft: Draft) -> list[_Part]:
    """Return the ways of a model, over one sink. What an earlier try wrote for other shards is removed."""
    sink = ShardSink(draft.path, dict(work.outputs), work.shards(place.shard_size))
    journals = list(draft.path.glob("journal-*"))
    if len(journals) != 1 or not sink.complete():
        for path in draft.path.iterdir():  # files too: they may be those of another shard size
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        # A name of its own: a worker still busy with a pass that was called off can then not take this one's word.
        journals = [draft.path / f"journal-{uuid.uuid4().hex[:12]}"]
    parts = [_Part(way, work.step.key, sink, journals[0]) for way in work.ways]
    for part in parts:
        part.journal.mkdir(parents=True, exist_ok=True)
    return parts


def _grouped(items: Sequence[Item], base: Callable[[Item], str]) -> list[list[Item]]:
    """Return the items grouped by the base that they count changes from. A pass has one base."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(base(item), []).append(item)
    return list(groups.values())


def _scanning(place: Place, works: Sequence[ScanWork]) -> PassPlan:
    """Return the pass that completes statistics, all from one base."""
    position = _positions(work.experts for work in works)
    jobs = tuple(
        StatisticJob(
            work.step.key,
            work.statistic,
            tuple(position[expert] for expert in work.experts),
            work.selection,
            _results(place, work.inputs),
        )
        for work in works
    )
    read = {name: info for work in works for name, info in work.selection.items()}
    return _pass(place, position, works[0].base, read, (), jobs)


def _writing(place: Place, parts: Sequence[_Part]) -> PassPlan:
    """Return the pass that writes models or links, all from one base."""
    position = _positions(part.way.experts for part in parts)
    jobs = tuple(
        MergeJob(
            part.key,
            part.way.method,
            tuple(position[expert] for expert in part.way.experts) if part.way.method.needs_experts else (),
            frozenset(part.way.layout.merged),
            dict(part.way.outputs),
            _results(place, part.way.inputs),
            part.sink,
            part.journal,
        )
        for part in parts
    )
    layouts = [part.way.layout for part in parts]
    read = {name: info for layout in layouts for name, info in {**layout.merged, **layout.copied}.items()}
    return _pass(place, position, parts[0].way.base, read, jobs, ())


def _pass(
    place: Place,
    position: Mapping[str, int],
    base: str,
    read: Mapping[str, TensorInfo],
    merges: tuple[MergeJob, ...],
    statistics: tuple[StatisticJob, ...],
) -> PassPlan:
    """Return what the engine needs: each expert of the pool once, every job's share of them, and the spans."""
    pool_base, experts = opened(place.pool, place.folders)
    drawing = [job.experts for job in merges if "tensors" in job.method.drawn_by]
    drawing += [job.experts for job in statistics if "tensors" in job.statistic.drawn_by]
    ids = tuple(position)
    drawn = sorted({ids[number] for numbers in drawing for number in numbers})
    experts |= with_tensors_ids(place, {expert: experts[expert] for expert in drawn})
    instead = experts[base] if base else None
    return PassPlan(
        instead.stored if isinstance(instead, FullExpert) else pool_base,
        tuple(experts[expert] for expert in position),
        merges,
        statistics,
        plan_spans(read, coarsest([job.method for job in merges])),
        place.device,
        place.library,
        place.memory,
        place.pool.base.weights,
    )


def _positions(groups: Iterator[tuple[str, ...]] | Sequence[tuple[str, ...]]) -> dict[str, int]:
    """Return the position of each expert among those that a pass reads. They are sorted by id."""
    ids = sorted({expert for group in groups for expert in group})
    return {expert: number for number, expert in enumerate(ids)}


def _results(place: Place, inputs: Mapping[str, tuple[Work, ...]]) -> dict[str, list[Found]]:
    """Return the results of works, by the name under which each is handed on."""
    return {name: [read_statistic(place.store, work.step) for work in works] for name, works in inputs.items()}

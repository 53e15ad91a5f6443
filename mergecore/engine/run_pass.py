"""A pass: reads the models of a pool once, grid block by grid block, and completes many jobs on the way."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

from mergecore.engine.executor import Executor
from mergecore.engine.memory import at_once
from mergecore.engine.pass_plan import PassOutcome, PassPlan, PassReading, SpanOutcome
from mergecore.engine.span import run_span
from mergecore.events import Event, Report
from mergecore.identity.content import model_digest, tensor_digest
from mergecore.plugins.block import Per
from mergecore.plugins.statistic import Rescan, Result


def run_pass(plan: PassPlan, executor: Executor, report: Report) -> PassOutcome:
    """Complete every job of the plan: in one reading of the models, and in more where a statistic asks for them.

    Raises NonFiniteError and CapacityError.
    """
    outcome = PassOutcome()
    begun = {job.key: job.statistic.begin(job.selection, job.statistics) for job in plan.statistics}
    digests: dict[str, dict[str, dict[int, str]]] = {job.key: {} for job in plan.merges}
    states, wanted = _next_states(plan, begun, outcome)
    everything = plan.merges or any(not isinstance(state, Rescan | Result) for state in begun.values())
    reading = PassReading(plan, states, None if everything else wanted)
    numbers = _spans_read(reading)
    # Merges begin where their statistics ended, and each reading goes the other way. If a pool is larger than the page
    # cache, the cache has what was read last.
    backwards = bool(plan.merges)
    workers = at_once(plan, executor.workers, plan.memory)
    if workers < executor.workers:
        report(Event(f"memory is for {workers} of {executor.workers} spans at a time"))
    for job in plan.merges:
        job.sink.prepare()
    while numbers:
        gathered = _read(reading, numbers, backwards, executor, report, workers)
        backwards = not backwards
        for key, tensors in gathered.digests.items():
            digests[key].update(tensors)
        finished = {
            job.key: job.statistic.finish(gathered.states[job.key], job.selection, job.statistics)
            for job in plan.statistics
            if job.key in gathered.states
        }
        states, wanted = _next_states(plan, finished, outcome)
        reading = PassReading(plan, states, wanted)
        numbers = _spans_read(reading)
    for job in plan.merges:
        in_order = {
            name: [by_start[start] for start in sorted(by_start)] for name, by_start in digests[job.key].items()
        }
        written = {name: tensor_digest(blocks) for name, blocks in in_order.items()}
        outcome.blocks[job.key] = in_order
        outcome.tensors[job.key] = written
        outcome.models[job.key] = model_digest(
            {name: (info.dtype, info.shape, written[name]) for name, info in job.outputs.items()}
        )
    return outcome


def _read(
    reading: PassReading, numbers: Sequence[int], backwards: bool, executor: Executor, report: Report, workers: int
) -> SpanOutcome:
    """Return the digests and states of all spans together. States are combined as they come: only one is kept of each.

    Whole tensors differ in size a thousandfold, and all workers wait for the last one. So the largest are begun
    first.
    """
    together = SpanOutcome()
    statistics = {job.key: job.statistic for job in reading.plan.statistics}
    spans = reading.plan.spans
    sizes = [sum(stop - start for group in span for _, start, stop in reading.wanted(group)) for span in spans]
    total, done = sum(sizes[number] for number in numbers), 0
    whole = any(job.method.per is not Per.ELEMENT for job in reading.plan.merges)
    order = sorted(numbers, key=lambda number: -sizes[number]) if whole else numbers[::-1] if backwards else numbers
    for position, span_outcome in executor.each(run_span, reading, order, workers):
        for key, tensors in span_outcome.digests.items():
            gathered = together.digests.setdefault(key, {})
            for name, blocks in tensors.items():
                gathered.setdefault(name, {}).update(blocks)
        for key, state in span_outcome.states.items():
            known = together.states.get(key)
            together.states[key] = state if known is None else statistics[key].combine(known, state)
        done += sizes[order[position]]
        report(Event("reading", done, total, "elements"))
    return together


def _next_states(
    plan: PassPlan, answers: Mapping[str, Any], outcome: PassOutcome
) -> tuple[dict[str, bytes], dict[str, tuple[tuple[int, int], ...] | None]]:
    """Put the results among the statistics' answers into the outcome.

    Returns the states of those that go on, and which parts of which tensors they ask for (None: all of a tensor).
    """
    states: dict[str, bytes] = {}
    whole: set[str] = set()
    parts: dict[str, set[tuple[int, int]]] = {}
    for job in plan.statistics:
        answer = answers.get(job.key)
        if isinstance(answer, Result):
            outcome.results[job.key] = answer
        elif isinstance(answer, Rescan):
            states[job.key] = pickle.dumps(answer.state, pickle.HIGHEST_PROTOCOL)
            whole.update(job.selection if answer.parts is None else ())
            for name, start, stop in answer.parts or ():
                parts.setdefault(name, set()).add((start, stop))
        elif job.key in answers:
            states[job.key] = pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)
    return states, {name: tuple(sorted(ranges)) for name, ranges in parts.items()} | dict.fromkeys(whole)


def _spans_read(reading: PassReading) -> list[int]:
    """Return the numbers of the spans of which something is read."""
    spans = reading.plan.spans
    return [number for number, span in enumerate(spans) if any(reading.wanted(group) for group in span)]

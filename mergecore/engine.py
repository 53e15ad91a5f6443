"""A pass: reads the models of a pool once, block by block, and completes many merges and statistics on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergecore.identity import model_digest, tensor_digest
from mergecore.method import Event, Report, Rescan
from mergecore.passes import Executor, PassOutcome, PassPlan, Round, SpanOutcome
from mergecore.projection import at_once
from mergecore.span import run_span


def run_pass(plan: PassPlan, executor: Executor, report: Report) -> PassOutcome:
    """Complete every job of the plan: one reading for all of them, and rescans where a statistic asks for one."""
    outcome = PassOutcome()
    states = {job.key: job.statistic.begin(job.selection, job.statistics) for job in plan.statistics}
    digests: dict[str, dict[str, dict[int, str]]] = {job.key: {} for job in plan.merges}
    numbers, round = list(range(len(plan.spans))), Round(plan, states)
    workers = at_once(plan, executor.workers, plan.memory)
    if workers < executor.workers:
        report(Event(f"memory is for {workers} of {executor.workers} spans at a time"))
    for job in plan.merges:
        job.sink.prepare()
    while numbers:
        gathered = _read_round(round, numbers, executor, report, workers)
        for key, held in gathered.digests.items():
            digests[key].update(held)
        states, only = _finish_round(plan, gathered.states, outcome)
        round = Round(plan, states, only)
        numbers = [number for number, span in enumerate(plan.spans) if any(round.wanted(unit) for unit in span)]
    for job in plan.merges:
        found = {
            name: tensor_digest([blocks[at] for at in sorted(blocks)]) for name, blocks in digests[job.key].items()
        }
        outcome.tensors[job.key] = found
        outcome.models[job.key] = model_digest({n: (i.dtype, i.shape, found[n]) for n, i in job.outputs.items()})
    return outcome


def _read_round(round: Round, numbers: Sequence[int], executor: Executor, report: Report, workers: int) -> SpanOutcome:
    """All spans' digests and states together; states are joined as they come, for one of each is enough to hold."""
    together = SpanOutcome()
    statistics = {job.key: job.statistic for job in round.plan.statistics}
    sizes = [sum(stop - start for unit in span for _, start, stop in unit) for span in round.plan.spans]
    total, done = sum(sizes[number] for number in numbers), 0
    for position, found in executor.each(run_span, round, numbers, workers):
        for key, digests in found.digests.items():
            held = together.digests.setdefault(key, {})
            for name, blocks in digests.items():
                held.setdefault(name, {}).update(blocks)
        for key, state in found.states.items():
            known = together.states.get(key)
            together.states[key] = state if known is None else statistics[key].combine(known, state)
        done += sizes[numbers[position]]
        report(Event("reading", done, total, "elements"))
    return together


def _finish_round(
    plan: PassPlan, states: Mapping[str, Any], outcome: PassOutcome
) -> tuple[dict[str, Any], dict[str, frozenset[int] | None]]:
    """Finish the statistics; returns the states of those that read again, and what of which tensor is read for them."""
    again: dict[str, Any] = {}
    only: dict[str, frozenset[int] | None] = {}
    for job in plan.statistics:
        if job.key not in states:
            continue
        finished = job.statistic.finish(states[job.key], job.selection, job.statistics)
        if isinstance(finished, Rescan):
            again[job.key] = finished.state
            for name in job.selection if finished.blocks is None else ():
                only[name] = None
            for name, start in finished.blocks or ():
                held = only.get(name, frozenset())
                only[name] = None if held is None else held | {start}
        else:
            outcome.results[job.key] = finished
    return again, only

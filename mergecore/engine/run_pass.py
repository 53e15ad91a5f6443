"""A pass: reads the models of a pool once, block by block, and completes many merges and statistics on the way."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

from mergecore.engine.executor import Executor
from mergecore.engine.memory import at_once
from mergecore.engine.pass_plan import PassOutcome, PassPlan, Round, SpanOutcome
from mergecore.engine.span import run_span
from mergecore.events import Event, Report
from mergecore.identity.content import model_digest, tensor_digest
from mergecore.plugins.block import Per
from mergecore.plugins.statistic import Rescan, Result


def run_pass(plan: PassPlan, executor: Executor, report: Report) -> PassOutcome:
    """Complete every job of the plan: one reading for all of them, and rescans where a statistic asks for one."""
    outcome = PassOutcome()
    begun = {job.key: job.statistic.begin(job.selection, job.statistics) for job in plan.statistics}
    digests: dict[str, dict[str, dict[int, str]]] = {job.key: {} for job in plan.merges}
    states, wanted = _sorted_out(plan, begun, outcome)
    everything = plan.merges or any(not isinstance(one, Rescan | Result) for one in begun.values())
    round = Round(plan, states, None if everything else wanted)
    numbers = _read_in(round)
    # Merges begin where their statistics ended, and rescans turn round: what is left in the page cache of a pool that is
    # larger was read last.
    backwards = bool(plan.merges)
    workers = at_once(plan, executor.workers, plan.memory)
    if workers < executor.workers:
        report(Event(f"memory is for {workers} of {executor.workers} spans at a time"))
    for job in plan.merges:
        job.sink.prepare()
    while numbers:
        gathered = _read_round(round, numbers, backwards, executor, report, workers)
        backwards = not backwards
        for key, held in gathered.digests.items():
            digests[key].update(held)
        finished = {
            job.key: job.statistic.finish(gathered.states[job.key], job.selection, job.statistics)
            for job in plan.statistics
            if job.key in gathered.states
        }
        states, wanted = _sorted_out(plan, finished, outcome)
        round = Round(plan, states, wanted)
        numbers = _read_in(round)
    for job in plan.merges:
        found = {
            name: tensor_digest([blocks[at] for at in sorted(blocks)]) for name, blocks in digests[job.key].items()
        }
        outcome.tensors[job.key] = found
        outcome.models[job.key] = model_digest({n: (i.dtype, i.shape, found[n]) for n, i in job.outputs.items()})
    return outcome


def _read_round(
    round: Round, numbers: Sequence[int], backwards: bool, executor: Executor, report: Report, workers: int
) -> SpanOutcome:
    """All spans' digests and states together; states are joined as they come, for one of each is enough to hold.

    Whole tensors differ in size a thousandfold: the largest are begun first then, for what is begun last is waited for.
    """
    together = SpanOutcome()
    statistics = {job.key: job.statistic for job in round.plan.statistics}
    spans = round.plan.spans
    sizes = [sum(stop - start for unit in span for _, start, stop in round.wanted(unit)) for span in spans]
    total, done = sum(sizes[number] for number in numbers), 0
    whole = any(job.method.per is not Per.ELEMENT for job in round.plan.merges)
    order = sorted(numbers, key=lambda number: -sizes[number]) if whole else numbers[::-1] if backwards else numbers
    for position, found in executor.each(run_span, round, order, workers):
        for key, digests in found.digests.items():
            held = together.digests.setdefault(key, {})
            for name, blocks in digests.items():
                held.setdefault(name, {}).update(blocks)
        for key, state in found.states.items():
            known = together.states.get(key)
            together.states[key] = state if known is None else statistics[key].combine(known, state)
        done += sizes[order[position]]
        report(Event("reading", done, total, "elements"))
    return together


def _sorted_out(
    plan: PassPlan, found: Mapping[str, Any], outcome: PassOutcome
) -> tuple[dict[str, bytes], dict[str, tuple[tuple[int, int], ...] | None]]:
    """Of what statistics began with or ended in: results go to the outcome; returns the states of those that go on, and
    what of which tensor the wishes among them name."""
    states: dict[str, bytes] = {}
    whole: set[str] = set()
    parts: dict[str, set[tuple[int, int]]] = {}
    for job in plan.statistics:
        one = found.get(job.key)
        if isinstance(one, Result):
            outcome.results[job.key] = one
        elif isinstance(one, Rescan):
            states[job.key] = pickle.dumps(one.state, pickle.HIGHEST_PROTOCOL)
            whole.update(job.selection if one.parts is None else ())
            for name, start, stop in one.parts or ():
                parts.setdefault(name, set()).add((start, stop))
        elif job.key in found:
            states[job.key] = pickle.dumps(one, pickle.HIGHEST_PROTOCOL)
    return states, {name: tuple(sorted(held)) for name, held in parts.items()} | dict.fromkeys(whole)


def _read_in(round: Round) -> list[int]:
    """The spans of which a reading reads something."""
    return [number for number, span in enumerate(round.plan.spans) if any(round.wanted(unit) for unit in span)]

"""A pass: reads the models of a pool once, block by block, and completes many merges and statistics on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergecore.identity import model_digest, tensor_digest
from mergecore.method import Event, Report, Rescan
from mergecore.passes import Executor, PassOutcome, PassPlan, Round, SpanOutcome, SpanTask
from mergecore.span import run_span


def run_pass(plan: PassPlan, executor: Executor, report: Report) -> PassOutcome:
    """Complete every job of the plan: one reading for all of them, and rescans where a statistic asks for one."""
    outcome = PassOutcome()
    states = {job.key: job.statistic.begin(job.selection, job.statistics) for job in plan.statistics}
    digests: dict[str, dict[str, dict[int, str]]] = {job.key: {} for job in plan.merges}
    tasks = [SpanTask(number, None) for number in range(len(plan.spans))]
    for job in plan.merges:
        job.sink.prepare()
    while tasks:
        gathered = _read_round(Round(plan, states), tasks, executor, report)
        for number in sorted(gathered):
            for key, held in gathered[number].digests.items():
                for name, blocks in held.items():
                    digests[key].setdefault(name, {}).update(blocks)
        states, names = _finish_round(plan, states, gathered, outcome)
        tasks = [
            SpanTask(number, names)
            for number, span in enumerate(plan.spans)
            if any(name in names for unit in span for name, _, _ in unit)
        ]
    for job in plan.merges:
        found = {
            name: tensor_digest([blocks[at] for at in sorted(blocks)]) for name, blocks in digests[job.key].items()
        }
        outcome.tensors[job.key] = found
        outcome.models[job.key] = model_digest({n: (i.dtype, i.shape, found[n]) for n, i in job.outputs.items()})
    return outcome


def _read_round(round: Round, tasks: Sequence[SpanTask], executor: Executor, report: Report) -> dict[int, SpanOutcome]:
    gathered: dict[int, SpanOutcome] = {}
    sizes = [sum(stop - start for unit in span for _, start, stop in unit) for span in round.plan.spans]
    total = sum(sizes[task.number] for task in tasks)
    done = 0
    for position, found in executor.each(run_span, round, tasks):
        gathered[tasks[position].number] = found
        done += sizes[tasks[position].number]
        report(Event("reading", done, total, "elements"))
    return gathered


def _finish_round(
    plan: PassPlan, states: Mapping[str, Any], gathered: Mapping[int, SpanOutcome], outcome: PassOutcome
) -> tuple[dict[str, Any], frozenset[str]]:
    """Join the spans' states in order; returns the states of statistics that read again, and the tensors they name."""
    again: dict[str, Any] = {}
    names: set[str] = set()
    for job in plan.statistics:
        if job.key not in states:
            continue
        parts = [gathered[number].states[job.key] for number in sorted(gathered)]
        joined = parts[0]
        for part in parts[1:]:
            joined = job.statistic.combine(joined, part)
        finished = job.statistic.finish(joined, job.selection, job.statistics)
        if isinstance(finished, Rescan):
            again[job.key] = finished.state
            names |= set(job.selection if finished.tensors is None else finished.tensors)
        else:
            outcome.results[job.key] = finished
    return again, frozenset(names)

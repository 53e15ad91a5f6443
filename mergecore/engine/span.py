"""One span of a pass, in the process and thread it is called in: every block read once, every job done on it."""

from __future__ import annotations

import pickle

import torch

from mergecore.engine.journal import read_journal, write_journal
from mergecore.engine.loops import Loops
from mergecore.engine.memory import pass_models
from mergecore.engine.merges import Merges
from mergecore.engine.pass_plan import Round, SpanOutcome
from mergecore.engine.scans import Scans
from mergecore.engine.windows import Readers, Reading


def run_span(round: Round, number: int) -> SpanOutcome:
    """Do one span: every merge that has not journalled it, and every statistic that has a state in this round.

    Raises NonFiniteError naming tensor and expert, or tensor and method.
    """
    # Sums differ in their last bits between one thread and two; spans are what runs in parallel.
    torch.set_num_threads(1)
    plan, span, outcome = round.plan, round.plan.spans[number], SpanOutcome()
    open_merges = []
    for job in plan.merges if round.only is None else ():
        journal = read_journal(job, span)
        outcome.digests[job.key] = journal or {}
        if journal is None:
            open_merges.append(job)
    observers = [job for job in plan.statistics if job.key in round.states]
    outcome.states = {job.key: pickle.loads(round.states[job.key]) for job in observers}
    loops = Loops(round)
    scans, merges = Scans(loops, observers, outcome.states), Merges(plan, loops, open_merges, outcome.digests)
    with torch.inference_mode():
        units = [wanted for unit in span if (wanted := round.wanted(unit))]
        readers = Readers(plan, pass_models(plan).window)
        for position, unit in enumerate(units):
            if position + 1 < len(units):
                readers.expect(units[position + 1])
            readings = [Reading(readers, *piece) for piece in unit]
            for reading in readings:
                scans.observe(reading)
                merges.merge(reading)
            merges.merge_whole(readings)
        scans.finish()
    for job in open_merges:
        write_journal(job, span, outcome.digests[job.key])
    return outcome

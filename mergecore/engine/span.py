"""One span of a pass, in the calling thread: every grid block is read once, and every job is done on it."""

from __future__ import annotations

import pickle

import torch

from mergecore.engine.journal import read_journal, write_journal
from mergecore.engine.loops import Loops
from mergecore.engine.memory import pass_models
from mergecore.engine.merges import Merges
from mergecore.engine.pass_plan import PassReading, SpanOutcome
from mergecore.engine.scans import Scans
from mergecore.engine.windows import Readers, Reading


def run_span(reading: PassReading, number: int) -> SpanOutcome:
    """Do one span: every merge that has not journalled it, and every statistic that has a state in this reading.

    Raises NonFiniteError naming tensor and expert, or tensor and method.
    """
    # Sums differ in their last bits between one thread and two; spans are what runs in parallel.
    torch.set_num_threads(1)
    plan, span, outcome = reading.plan, reading.plan.spans[number], SpanOutcome()
    open_merges = []
    for job in plan.merges if reading.only is None else ():
        journal = read_journal(job, span)
        outcome.digests[job.key] = journal or {}
        if journal is None:
            open_merges.append(job)
    observers = [job for job in plan.statistics if job.key in reading.states]
    outcome.states = {job.key: pickle.loads(reading.states[job.key]) for job in observers}
    loops = Loops(reading)
    scans, merges = Scans(loops, observers, outcome.states), Merges(plan, loops, open_merges, outcome.digests)
    with torch.inference_mode():
        groups = [wanted for group in span if (wanted := reading.wanted(group))]
        readers = Readers(plan, pass_models(plan).window)
        for position, group in enumerate(groups):
            if position + 1 < len(groups):
                readers.expect(groups[position + 1])
            readings = [Reading(readers, *blocks) for blocks in group]
            for one_tensor in readings:
                scans.observe(one_tensor)
                merges.merge(one_tensor)
            merges.merge_whole(readings)
        scans.finish()
    for job in open_merges:
        write_journal(job, span, outcome.digests[job.key])
    return outcome

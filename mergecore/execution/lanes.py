"""Carries out works, those of one lane together: in a notebook, on the command line and in a Prefect task alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mergecore.execution.outcome import Done
from mergecore.execution.passes import run_scans, run_written
from mergecore.execution.place import Place
from mergecore.execution.spread import run_adapters, run_model_works
from mergecore.planning.work import Lane, Work

RUN: Mapping[Lane, Callable[[Place, Sequence[Any]], Done]] = {
    Lane.SCAN: run_scans,
    Lane.ADAPTERS: run_adapters,
    Lane.MODELS: run_model_works,
    Lane.WRITE: run_written,
}
"""How each lane is carried out, in the order in which lanes follow each other."""


def run_works(place: Place, works: Sequence[Work]) -> Done:
    """Complete works whose inputs are at hand; record each in the store. A failure does not stop the others."""
    done = Done()
    for lane, run in RUN.items():
        group = [work for work in works if work.lane is lane]
        if group:
            done = done.note(run(place, group))
    return done

"""The ids by which random masks are drawn: taken once, kept in the store, told in the record of a model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from mergecore.checkpoints.experts import Expert
from mergecore.checkpoints.layout import tied_names
from mergecore.events import Event
from mergecore.execution.outcome import made_with
from mergecore.execution.place import Place
from mergecore.identity.keys import Step
from mergecore.planning.pool import Pool
from mergecore.planning.work import AdapterWork, Way

SomeExpert = TypeVar("SomeExpert", bound=Expert)
AT_ONCE = 4
"""Experts whose tensors are read side by side."""


def tensors_step(expert: str, pool: Pool) -> Step:
    """Return the step that takes the id of an expert's tensors. expert: its id, the digest of its files.

    What the base ties does not count: some versions of a library save it twice, others once.
    """
    return Step("snapshot", "tensors", 1, {"without": _tied(pool)}, {"weights": expert})


def _tied(pool: Pool) -> list[str]:
    return sorted(tied_names(pool.base.tensors, pool.base.config))


def with_tensors_ids(place: Place, experts: Mapping[str, SomeExpert]) -> dict[str, SomeExpert]:
    """Return the experts with the ids of their tensors. What the store does not know is read."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        ids = list(pool.map(lambda expert: _tensors_id(place, expert), experts.values()))
    return {
        name: expert.identified(tensors_id) for (name, expert), tensors_id in zip(experts.items(), ids, strict=True)
    }


def _tensors_id(place: Place, expert: Expert) -> str:
    step = tensors_step(expert.id, place.pool)
    record = place.store.record(step)
    if record is not None:
        return record.digest
    place.report(Event(f"identify the tensors of '{expert.name}'"))
    began = time.monotonic()
    with place.store.draft(step) as draft:
        return place.store.commit(draft, expert.identify(_tied(place.pool)), {}, made_with(began)).digest


def drawn_with(place: Place, works: Sequence[Way | AdapterWork]) -> dict[str, Any]:
    """Return what the record says of random masks: {'drawn_with': {kind of id: {expert: id}}}, or nothing."""
    told: dict[str, dict[str, str]] = {}
    for work in works:
        for kind in sorted(work.method.drawn_by):
            for expert in work.experts:
                record = place.store.record(tensors_step(expert, place.pool)) if kind == "tensors" else None
                told.setdefault(kind, {})[expert] = expert if record is None else record.digest
    return {"drawn_with": told} if told else {}

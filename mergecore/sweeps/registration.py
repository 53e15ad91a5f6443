"""Publishes the best cell's product inside the store and records the registration."""

from __future__ import annotations

import time
from collections.abc import Mapping

from mergecore.execution.outcome import Done, made_with
from mergecore.execution.place import Place
from mergecore.formats.finished import finished_merge
from mergecore.identity.keys import Step
from mergecore.planning.cells import Cell
from mergecore.store.store import write_json
from mergecore.sweeps.publication import publish
from mergecore.sweeps.registration_record import registration_file
from mergecore.sweeps.remaining import Frontier


def register(place: Place, frontier: Frontier, cell: Cell, chosen_on: str, scores: Mapping[str, float]) -> Done:
    """Publish the best cell's product inside the store (weights linked, not copied) and record the registration.

    The record is what MLflow's registry is projected from. Raises StoreError where the product's bytes are not there.
    """
    began = time.monotonic()
    store, plan, merge = place.store, frontier.plan, cell.merge
    settings = plan.spec.output.register_
    assert settings is not None and merge is not None
    contents, step = finished_merge(store, plan.pool, merge), registration_step(frontier, cell)
    if not store.is_done(step, bytes_needed=True):
        with store.draft(step) as draft:
            publish(place, frontier, cell, draft.path, scores)
            store.commit(draft, contents.digest, {"cell": cell.name}, made_with(began))
    path = registration_file(store, plan.spec.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "cell": cell.id,
        "name": settings.name,
        "alias": settings.alias,
        "uri": store.folder(step).as_uri(),
        "digest": contents.digest,
        "chosen_on": chosen_on,
    }
    write_json(path, record)
    return Done([step.name], {}, time.monotonic() - began)


def registration_step(frontier: Frontier, cell: Cell) -> Step:
    """Return the step that publishes a cell's product."""
    assert cell.merge is not None
    product, companions = cell.merge.product, frontier.plan.pool.base.companions
    inputs = {product.registered_as: cell.merge.published.step.key, "companions": companions}
    return Step("registration", cell.merge.method.name, 1, {}, inputs)

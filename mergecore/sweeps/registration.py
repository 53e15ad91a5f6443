"""A model as a directory that `transformers` loads: weights, config, tokenizer, chat template and a model card."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from mergecore.checkpoints.adapters import CONFIG, STEM
from mergecore.checkpoints.snapshot import Snapshot
from mergecore.errors import StoreError
from mergecore.execution.outcome import Done, made_with
from mergecore.execution.place import Place
from mergecore.formats.adapter_folder import write_config
from mergecore.formats.card import model_card
from mergecore.formats.companions import write_companions
from mergecore.formats.masks_product import describe, published_name
from mergecore.identity.keys import Step
from mergecore.planning.cells import Cell
from mergecore.planning.plans import MergePlan
from mergecore.store.store import Record, write_json
from mergecore.sweeps.lineage import lineage
from mergecore.sweeps.registration_record import registration_file
from mergecore.sweeps.remaining import Frontier
from mergecore.tensors.dtypes import CONFIG_DTYPE


def register(place: Place, frontier: Frontier, cell: Cell, chosen_on: str, scores: Mapping[str, float]) -> Done:
    """Publish the best cell's product inside the store (weights linked, not copied) and record the registration: its
    model, or, where adapters were merged into one, that adapter.

    The record is what MLflow's registry is projected from. Raises StoreError where the product's bytes are not there.
    """
    began = time.monotonic()
    store, plan = place.store, frontier.plan
    settings = plan.spec.output.register_
    assert settings is not None and cell.merge is not None
    product = cell.merge.product
    record = store.record(product)
    if record is None or record.dropped:
        raise StoreError(f"the {product.kind} of {cell.name} is not in the store; run the sweep again")
    step = registration_step(frontier, cell)
    origin = lineage(plan, cell, record.result)
    if not store.is_done(step, bytes_needed=True):
        with store.draft(step) as draft:
            if cell.merge.method.makes == "adapter":
                _link_adapter(place, product, draft.path)
                origin |= {"error": record.result["error"]} if "error" in record.result else {}
            else:
                _link_model(place, cell.merge, record, draft.path, plan.pool.base)
            if cell.merge.method.makes == "masks":
                origin["saved"] = describe(cell.merge, plan.pool, draft.path)
            (draft.path / "README.md").write_text(model_card(origin["recipe"], origin, scores))
            store.commit(draft, record.digest, {"cell": cell.name}, made_with(began))
    path = registration_file(store, plan.spec.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    held = {
        "cell": cell.id,
        "name": settings.name,
        "alias": settings.alias,
        "uri": store.folder(step).as_uri(),
        "digest": record.digest,
        "chosen_on": chosen_on,
    }
    write_json(path, held)
    return Done([step.name], {}, time.monotonic() - began)


def _link_model(place: Place, merge: MergePlan, record: Record, folder: Path, base: Snapshot) -> None:
    """A model's weights under a second name, and what goes with them."""
    for name in record.files:
        if (published := published_name(merge, name)) is not None:
            os.link(place.store.folder(merge.step) / name, folder / published)
    dtypes = sorted({info[0] for info in record.result["tensors"].values() if info[0] in CONFIG_DTYPE})
    write_companions(folder, base, place.folders[base.weights], dtypes)


def _link_adapter(place: Place, product: Step, folder: Path) -> None:
    """An adapter's weights under a second name, and its configuration, which names the base it is for."""
    held = place.store.folder(product)
    os.link(held / f"{STEM}.safetensors", folder / f"{STEM}.safetensors")
    config = json.loads((held / CONFIG).read_text())
    write_config(
        folder, {**config, "base_model_name_or_path": config["base_model_name_or_path"] or place.pool.base.source.uri}
    )


def registration_step(frontier: Frontier, cell: Cell) -> Step:
    """The step that publishes a cell's product."""
    assert cell.merge is not None
    product, companions = cell.merge.product, frontier.plan.pool.base.companions
    inputs = {"adapter" if product.kind == "adapter" else "model": product.key, "companions": companions}
    return Step("registration", cell.merge.method.name, 1, {}, inputs)

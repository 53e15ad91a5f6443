"""A model as a directory that `transformers` loads: weights, config, tokenizer, chat template and a model card."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergecore.adapter_files import write_config
from mergecore.adapters import CONFIG, STEM
from mergecore.collect import lineage
from mergecore.errors import StoreError
from mergecore.frontier import Frontier, registration_file
from mergecore.identity import Step
from mergecore.plan import Cell, MergePlan
from mergecore.product import describe, published_name
from mergecore.run import Done, Place, made_with
from mergecore.snapshot import Snapshot
from mergecore.spec import as_yaml
from mergecore.store import Record, write_json

TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def write_companions(folder: Path, snapshot: Snapshot, at: Path, dtypes: Sequence[str]) -> None:
    """Copy config, tokenizer, chat template and the like of `snapshot` (lying in `at`) beside merged weights.

    dtypes: safetensors names of the floating-point tensors written; where there is only one, the config says so.
    """
    for name in snapshot.source.files:
        if name.endswith((".safetensors", ".safetensors.index.json")) or name == "adapter_config.json":
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == "config.json":
            config = dict(snapshot.config)
            if len(set(dtypes)) == 1 and dtypes[0] in TORCH_NAMES:
                key = "torch_dtype" if "torch_dtype" in config else "dtype"
                config[key] = TORCH_NAMES[dtypes[0]]
            target.write_text(json.dumps(config, indent=2) + "\n")
        else:
            shutil.copyfile(at / name, target)


def write_chat_template(folder: Path, text: str) -> None:
    """Have `text` as the chat template, in the file of its own where transformers looks first."""
    (folder / "chat_template.jinja").write_text(text)
    config = folder / "tokenizer_config.json"
    if config.exists():
        held = json.loads(config.read_text())
        if held.pop("chat_template", None) is not None:
            config.write_text(json.dumps(held, indent=2, ensure_ascii=False) + "\n")


def model_card(recipe: Mapping[str, Any], origin: Mapping[str, Any], scores: Mapping[str, float] | None = None) -> str:
    """README.md of a merged model: what it is made of, the recipe as it can be run again, digests of every input."""
    base = origin["base"]["source"]
    head = {"base_model": [base, *(expert["source"] for expert in origin["experts"])], "tags": ["merge", "mergeloom"]}
    lines = [
        "---",
        as_yaml(head).strip(),
        "---",
        "",
        f"# Merge of {len(origin['experts'])} experts by {recipe['method']}",
        "",
    ]
    lines += [
        "Made with Mergeloom. The recipe, as `mergeloom merge` takes it:",
        "",
        "```yaml",
        as_yaml(dict(recipe)).strip(),
        "```",
    ]
    lines += ["", "| input | source | SHA-256 of its weights |", "|---|---|---|"]
    lines += [f"| base | {base} | `{origin['base']['weights']}` |"]
    lines += [f"| {one['name']} | {one['source']} | `{one['weights']}` |" for one in origin["experts"]]
    if origin.get("kept_density"):
        kept = ", ".join(f"{name} {share:.4%}" for name, share in origin["kept_density"].items())
        lines += ["", f"Share of each task vector that the threshold kept: {kept}."]
    if "error" in origin:
        lines += ["", f"Relative error of the cut to the rank, in the Frobenius norm: {origin['error']:.4%}."]
    if "saved" in origin:
        lines += [
            "",
            "This is no model but a product of masks: `mergeloom unpack` makes the model of one task from it.",
        ]
        lines += [f"It takes {origin['saved']}."]
    if scores:
        lines += ["", "| score | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4f} |" for name, value in scores.items()]
    return "\n".join(lines) + "\n"


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
    dtypes = sorted({info[0] for info in record.result["tensors"].values() if info[0] in TORCH_NAMES})
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

"""Makes what a recipe asks for: its model, or with `lora` the adapter that is nearest to the model."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import yaml

from mergecore.engine.executor import Executor
from mergecore.errors import SpecError, StoreError
from mergecore.events import Report
from mergecore.native.library import Library
from mergecore.recipes.extract_lora import RECORD, Extracted, extract_lora
from mergecore.recipes.merge_recipe import Origin, WrittenModel, merge_recipe
from mergecore.registry import product_of
from mergecore.spec.recipe import LoraRules, Recipe
from mergecore.spec.sources import BaseSpec, ExpertSpec, Resolver
from mergecore.spec.yaml_files import as_yaml

RECIPE = "mergeloom.yaml"
CARD = "README.md"


def make_recipe(
    recipe: Recipe,
    out: Path,
    resolve: Resolver,
    executor: Executor,
    report: Report,
    *,
    durable: bool = False,
    library: Library | None = None,
    memory: int | None = None,
    store: Path | None = None,
    origin: Origin | None = None,
) -> WrittenModel:
    """Make the recipe's model in `out`, or the adapter that it asks for in the model's place (see `merge_recipe`).

    The model that an adapter is taken from is written in float32 to a folder beside `out`, and removed. Raise a
    MergeloomError for what cannot be made. Then nothing is left at `out` or beside it.
    """
    if recipe.lora is None:
        return merge_recipe(
            recipe, out, resolve, executor, report, durable=durable, library=library, memory=memory, store=store,
            origin=origin,
        )  # fmt: skip
    base = _check(recipe)
    if os.path.lexists(out):
        raise StoreError(f"{out} exists already; choose another name or remove it")
    merged = recipe.model_copy(update={"lora": None, "dtype": "float32"})
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.absolute().parent) as folder:
            whole, adapter = Path(folder) / "merge", Path(folder) / "adapter"
            model = merge_recipe(
                merged, whole, resolve, executor, report, library=library, memory=memory, store=store, origin=origin
            )
            extracted = extract_lora(
                ExpertSpec(source=str(whole), name="the merge"), base, adapter, resolve, executor, report,
                rank=recipe.lora.rank, modules=recipe.lora.modules, dtype=recipe.dtype or "float32", durable=durable,
            )  # fmt: skip
            _describe(adapter, whole, recipe, recipe.lora, extracted, model.digest)
            adapter.rename(out)
    except OSError as error:
        raise StoreError(f"cannot write {out}: {error}") from error
    loss = (
        f"the adapter of rank {recipe.lora.rank} lacks {extracted.error:.3%} of the merge's change in its layers, "
        f"{extracted.total_error:.3%} of the whole change; {RECORD} has every tensor"
    )
    warnings = tuple(dict.fromkeys((*model.warnings, *extracted.warnings, loss)))
    return WrittenModel(out, extracted.digest, extracted.size, warnings, model.seconds)


def _check(recipe: Recipe) -> BaseSpec:
    """Return the base. Raise SpecError where no adapter of the merge can be written, before anything is read."""
    method = recipe.built()
    product = product_of(method)
    if not product.as_lora:
        raise SpecError(f"recipe.lora: '{method.name}' makes {product.noun}; leave the key out")
    if recipe.base is None:
        raise SpecError("recipe.base: an adapter (recipe.lora) changes a base; give the model that it shall change")
    if recipe.base.adapter is not None:
        raise SpecError(
            "recipe.lora: the base has an adapter folded in, and PEFT loads one without; write the base out"
        )
    for key in ("stack", "tokenizer", "chat_template"):
        if getattr(recipe, key):
            raise SpecError(f"recipe.{key}: an adapter (recipe.lora) has its base's layers and tokens; leave one out")
    if any(rule.take == "drop" for rule in recipe.select):
        raise SpecError("recipe.select: an adapter (recipe.lora) leaves out nothing of its base; write `take: copy`")
    return recipe.base


def _describe(adapter: Path, whole: Path, recipe: Recipe, rules: LoraRules, extracted: Extracted, digest: str) -> None:
    """Write the adapter's card, recipe and record: they name what was merged, not the folder that goes."""
    text = (whole / RECIPE).read_text()
    pinned = yaml.safe_load(text)
    asked = {key: value for key, value in pinned.items() if key != "dtype"}
    asked |= {"dtype": recipe.dtype} if recipe.dtype else {}
    asked |= {"lora": rules.model_dump(mode="json", exclude_defaults=True)}
    (adapter / RECIPE).write_text(as_yaml(asked))
    card = (whole / CARD).read_text().replace(as_yaml(pinned).strip(), as_yaml(asked).strip())
    card += (
        f"\nThis is not the merge itself: it is a LoRA adapter, in each of {len(extracted.rows)} linear layers the "
        f"nearest matrix of rank {rules.rank} to the merge's change. Relative error in the Frobenius norm: "
        f"{extracted.error:.4%} of these layers' change, {extracted.total_error:.4%} of the whole change; "
        f"{len(extracted.left_out)} tensors that changed are no linear layers here. Per tensor: `{RECORD}`.\n"
    )
    (adapter / CARD).write_text(card)
    record = json.loads((adapter / RECORD).read_text())
    record["expert"] = {"merge": asked, "weights": digest}
    (adapter / RECORD).write_text(json.dumps(record, indent=1) + "\n")

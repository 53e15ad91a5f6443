"""The lineage of a model, and the recipe that makes it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergecore.checkpoints.snapshot import Snapshot
from mergecore.checkpoints.vocabulary.rules import UNION
from mergecore.planning.cells import Cell, Plan
from mergecore.planning.data import uses


def lineage(plan: Plan, cell: Cell, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return recipe and origin of a cell's model: what a stranger needs to make it again."""
    base = plan.pool.base.as_stored
    merged = cell.experts if cell.merged is None else cell.merged
    experts = {name: plan.pool.experts[name].snapshot.as_stored for name in merged}
    origin: dict[str, Any] = {
        "base": {"source": base.source.uri, "weights": base.weights, "config": plan.pool.base.companions},
        "experts": [
            {"name": name, "source": snapshot.source.uri, "weights": snapshot.weights}
            for name, snapshot in experts.items()
        ],
        "recipe": recipe_of(plan, cell),
        "step": cell.model.as_json(),
    }
    if "kept_density" in result:
        origin["kept_density"] = plan.pool.by_name(result["kept_density"])
    if "learned" in result:
        origin["learned"] = result["learned"]
    if "drawn_with" in result:
        origin["drawn_with"] = {kind: plan.pool.by_name(ids) for kind, ids in result["drawn_with"].items()}
    if cell.merge is not None and (seen := uses(cell.merge)):
        origin["looked_at"] = [str(use) for use in seen]
    return origin


def recipe_of(plan: Plan, cell: Cell) -> dict[str, Any]:
    """Return the recipe from which `mergeloom merge` makes this cell's model alone; empty for a checkpoint as it
    stands.
    """
    if cell.kind != "merge" or cell.merge is None:
        return {}
    values = {name: value for name, value in cell.values.items() if name != "select"}
    merged = cell.experts if cell.merged is None else cell.merged
    spec = plan.spec
    base = plan.pool.base.as_stored
    # A vocabulary is that of the whole pool: all of it is named, and rules say who is merged.
    shared = spec.tokenizer is not None and cell.merge.product.pool_vocabulary
    everyone = list(plan.pool.experts) if shared else list(merged)
    recipe: dict[str, Any] = {
        "method": cell.merge.method.name,
        **values,
        "base": base.source.uri if base.adapter_source is None else _source(base),
        "experts": [{"name": name, **_source(plan.pool.experts[name].snapshot.as_stored)} for name in everyone],
    }
    if uses(cell.merge):
        recipe["data"] = {"evaluator": spec.evaluate.evaluator, **spec.evaluate.settings}
        recipe["data"] |= {"path": spec.evaluate.path} if spec.evaluate.path else {}
        for entry in recipe["experts"]:
            entry["tasks"] = list(plan.pool.experts[entry["name"]].tasks)
    if spec.output.dtype and cell.merge.product.dtype_in_recipe:
        recipe["dtype"] = spec.output.dtype
    rules = [rule.model_dump(mode="json", exclude_defaults=True) for rule in cell.select]
    if len(everyone) > len(merged):
        rules = [
            rule if rule.get("take", "merge") != "merge" else {"experts": list(merged), **rule}
            for rule in rules or [{}]
        ]
    if rules:
        recipe["select"] = rules
    if spec.tokenizer is not None:
        recipe["tokenizer"] = spec.tokenizer.model_dump(mode="json", exclude_defaults=True) or UNION
    return recipe


def _source(snapshot: Snapshot) -> dict[str, str]:
    """Return where a checkpoint comes from, with the adapter that is folded into it."""
    adapter = snapshot.adapter_source
    return {"source": snapshot.source.uri, **({} if adapter is None else {"adapter": adapter.uri})}

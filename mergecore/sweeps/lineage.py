"""Where a model comes from, and the recipe that makes it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergecore.checkpoints.snapshot import Snapshot
from mergecore.checkpoints.vocabulary.rules import UNION
from mergecore.planning.cells import Cell, Plan


def lineage(plan: Plan, cell: Cell, result: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe and origin of a cell's model: what a stranger needs to make it again."""
    base = plan.pool.base.as_stored
    merged = cell.experts if cell.merged is None else cell.merged
    experts = {name: plan.pool.experts[name].snapshot.as_stored for name in merged}
    found: dict[str, Any] = {
        "base": {"source": base.source.uri, "weights": base.weights, "config": plan.pool.base.companions},
        "experts": [{"name": name, "source": one.source.uri, "weights": one.weights} for name, one in experts.items()],
        "recipe": recipe_of(plan, cell),
        "step": cell.model.as_json(),
    }
    if "kept_density" in result:
        names = {member.id: member.name for member in plan.pool.members}
        found["kept_density"] = {names.get(one, one): kept for one, kept in result["kept_density"].items()}
    return found


def recipe_of(plan: Plan, cell: Cell) -> dict[str, Any]:
    """The recipe that `mergeloom merge` takes to make this cell's model alone; empty for a checkpoint as it stands."""
    if cell.kind != "merge" or cell.merge is None:
        return {}
    values = {name: value for name, value in cell.values.items() if name != "select"}
    merged = cell.experts if cell.merged is None else cell.merged
    spec = plan.spec
    base = plan.pool.base.as_stored
    # A vocabulary is that of the whole pool: all of it is named, and rules say who is merged.
    shared = spec.tokenizer is not None and cell.merge.method.makes == "model"
    everyone = list(plan.pool.experts) if shared else list(merged)
    recipe = {
        "method": cell.merge.method.name,
        **values,
        "base": base.source.uri if base.adapter_source is None else _origin(base),
        "experts": [{"name": name, **_origin(plan.pool.experts[name].snapshot.as_stored)} for name in everyone],
    }
    if spec.output.dtype and cell.merge.method.makes != "adapter":  # there it is the dense model's
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


def _origin(snapshot: Snapshot) -> dict[str, str]:
    """Say where a checkpoint comes from, and the adapter that is folded into it."""
    adapter = snapshot.adapter_source
    return {"source": snapshot.source.uri, **({} if adapter is None else {"adapter": adapter.uri})}

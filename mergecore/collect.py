"""From plan and store to what a sweep has measured: every number in a report comes from here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyarrow import parquet

from mergecore.folded import FoldedSnapshot
from mergecore.frontier import Frontier, read_registration
from mergecore.identity import Step
from mergecore.plan import Cell, Plan
from mergecore.run import ITEMS
from mergecore.scores import CellScores, Status, Sweep
from mergecore.snapshot import Snapshot
from mergecore.spec import as_yaml
from mergecore.store import Store
from mergecore.vocabulary.rules import UNION
from mergecore.vocabulary.snapshot import as_it_lies


def collect(frontier: Frontier) -> Sweep:
    """The sweep as the store holds it: scores per item, states and reasons, lineage, and what is registered."""
    frontier.refresh()
    plan, store = frontier.plan, frontier.store
    cells = tuple(_cell(frontier, cell) for cell in plan.cells)
    register = plan.spec.output.register_
    return Sweep(
        plan.spec.name,
        spec_text(plan),
        plan.suite,
        cells,
        register.by if register else "held_in",
        read_registration(store, plan.spec.name, {cell.cell for cell in cells}),
        frontier.trajectories(),
    )


def spec_text(plan: Plan) -> str:
    """The spec as YAML, defaults left out."""
    return as_yaml(plan.spec.model_dump(mode="json", exclude_defaults=True, by_alias=True))


def _cell(frontier: Frontier, cell: Cell) -> CellScores:
    plan, store = frontier.plan, frontier.store
    trouble = frontier.trouble(cell)
    pending = not trouble and any(True for _ in frontier.wanted(cell))
    status: Status = "refused" if cell.refused else "failed" if trouble else "pending" if pending else "done"
    items: dict[str, dict[str, NDArray[np.float64]]] = {}
    seconds = 0.0
    for split in plan.splits:
        for task in cell.tasks_on(split):
            step = plan.evaluation(cell, split, task)
            if frontier.done(step):
                items.setdefault(split, {})[task] = item_scores(store, step)
                seconds += frontier.seconds(step)
    record = store.record(cell.model) if cell.merge else None
    measured = {"eval/seconds": round(seconds, 3)} if seconds else {}
    if record is not None:
        measured["merge/seconds"] = float(record.made.get("seconds", 0.0))
    return CellScores(
        cell.id, cell.kind, cell.name, cell.method, shown_values(cell), cell.count, cell.subset, cell.experts,
        status, trouble, bool(frontier.chosen(cell)), cell.model.key, record.digest if record else "",
        items, measured, lineage(plan, cell, record.result if record else {}),
    )  # fmt: skip


def shown_values(cell: Cell) -> dict[str, Any]:
    """A cell's values for tables and figures: where a search merges some of the experts only, these as well."""
    return dict(cell.values) if cell.merged is None else {**cell.values, "experts": " + ".join(cell.merged)}


def item_scores(store: Store, step: Step) -> NDArray[np.float64]:
    """One score per item of an evaluation, float64."""
    with parquet.ParquetFile(store.folder(step) / ITEMS, pre_buffer=False) as file:  # a third of `read_table`'s time
        column = file.read(columns=["score"], use_threads=False).column("score")
    return np.asarray(column.to_numpy(), dtype=np.float64)


def lineage(plan: Plan, cell: Cell, result: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe and origin of a cell's model: what a stranger needs to make it again."""
    base = as_it_lies(plan.pool.base)
    merged = cell.experts if cell.merged is None else cell.merged
    experts = {name: as_it_lies(plan.pool.experts[name].snapshot) for name in merged}
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
    base = as_it_lies(plan.pool.base)
    # A vocabulary is that of the whole pool: all of it is named, and rules say who is merged.
    shared = spec.tokenizer is not None and cell.merge.method.makes == "model"
    everyone = list(plan.pool.experts) if shared else list(merged)
    recipe = {
        "method": cell.merge.method.name,
        **values,
        "base": _place(base) if isinstance(base, FoldedSnapshot) else base.source.uri,
        "experts": [{"name": name, **_place(as_it_lies(plan.pool.experts[name].snapshot))} for name in everyone],
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


def _place(snapshot: Snapshot) -> dict[str, str]:
    """Where a checkpoint comes from, and the adapter that is folded into it."""
    adapter = {"adapter": snapshot.adapter.source.uri} if isinstance(snapshot, FoldedSnapshot) else {}
    return {"source": snapshot.source.uri, **adapter}

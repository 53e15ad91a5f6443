"""From plan and store to what a sweep has measured: every number in a report comes from here."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyarrow import parquet

from mergecore.identity.keys import Step
from mergecore.planning.cells import Cell, Plan
from mergecore.reporting.scores import CellScores, Status, Sweep
from mergecore.spec.yaml_files import as_yaml
from mergecore.store.results import ITEMS
from mergecore.store.store import Store
from mergecore.sweeps.lineage import lineage
from mergecore.sweeps.registration_record import read_registration
from mergecore.sweeps.remaining import Frontier


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

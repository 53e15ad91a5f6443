"""What a sweep has measured, from plan and store. Every number in a report comes from here."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyarrow import parquet

from mergecore.identity.keys import Step
from mergecore.planning.cells import Cell, Plan
from mergecore.planning.data import uses
from mergecore.reporting.scores import CellScores, Status, Sweep
from mergecore.spec.yaml_files import as_yaml
from mergecore.store.results import ITEMS
from mergecore.store.store import State, Store
from mergecore.sweeps.lineage import lineage
from mergecore.sweeps.registration_record import read_registration
from mergecore.sweeps.remaining import Frontier


def collect(frontier: Frontier) -> Sweep:
    """Return the sweep as the store knows it: scores per item, states and reasons, lineage, and what is registered."""
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
        {task: identity.scale for own in plan.tasks.values() for task, identity in own.items()},
        plan.spec.evaluate.chance,
    )


def spec_text(plan: Plan) -> str:
    """Return the spec as YAML, without defaults."""
    return as_yaml(plan.spec.model_dump(mode="json", exclude_defaults=True, by_alias=True))


def _cell(frontier: Frontier, cell: Cell) -> CellScores:
    plan, store = frontier.plan, frontier.store
    trouble = frontier.view.trouble(cell)
    pending = not trouble and any(True for _ in frontier.choice.wanted(cell))
    status: Status = "refused" if cell.refused else "failed" if trouble else "pending" if pending else "done"
    items: dict[str, dict[str, NDArray[np.float64]]] = {}
    seconds = 0.0
    for split in plan.splits:
        for task in cell.tasks_on(split):
            step = plan.evaluation(cell, split, task)
            if frontier.view.done(step):
                items.setdefault(split, {})[task] = item_scores(store, step)
                seconds += frontier.view.seconds(step)
    record = store.record(cell.model) if cell.merge else None
    measured = {"eval/seconds": round(seconds, 3)} if seconds else {}
    if record is not None:
        measured["merge/seconds"] = float(record.provenance.get("seconds", 0.0))
    return CellScores(
        cell.id, cell.kind, marked(cell.name, cell), marked(cell.method, cell), shown_values(cell),
        cell.count, cell.subset, cell.experts,
        status, trouble, bool(frontier.choice.chosen(cell)), cell.model.key, record.digest if record else "",
        items, measured, lineage(plan, cell, record.result if record else {}),
        str(frontier.view.failure_path(cell) or "") if trouble else "",
        f"{cell.model.kind}/{cell.model.name}" if _is_kept(frontier, cell) else "",
    )  # fmt: skip


def marked(label: str, cell: Cell) -> str:
    """Return a label for tables; that of a merge that saw test items says so, since its scores are of these."""
    seen = () if cell.merge is None else uses(cell.merge)
    return f"{label} *transductive*" if label and any(use.inputs == "test" for use in seen) else label


def _is_kept(frontier: Frontier, cell: Cell) -> bool:
    """Return whether a cell's own model lies in the store."""
    return cell.merge is not None and not cell.refused and frontier.view.state(cell.model) is State.PRESENT


def shown_values(cell: Cell) -> dict[str, Any]:
    """Return a cell's values for tables and figures. Where a search merges some experts only, these are among them."""
    return dict(cell.values) if cell.merged is None else {**cell.values, "experts": " + ".join(cell.merged)}


def item_scores(store: Store, step: Step) -> NDArray[np.float64]:
    """Return the scores of an evaluation, one per item, shape (items,), float64."""
    with parquet.ParquetFile(store.folder(step) / ITEMS, pre_buffer=False) as file:  # a third of `read_table`'s time
        column = file.read(columns=["score"], use_threads=False).column("score")
    return np.asarray(column.to_numpy(), dtype=np.float64)

"""The scores of a sweep as one long table: a row for each cell, split and task, and one for each refused cell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]

from mergecore.planning.cells import Plan
from mergecore.plugins.evaluator import Split
from mergecore.reporting.curves import json_text
from mergecore.reporting.scales import shown
from mergecore.reporting.scores import CellScores, Suite, Sweep

SCHEMA = pa.schema(
    [
        ("sweep", pa.string()),
        ("cell", pa.string()),
        ("kind", pa.string()),
        ("name", pa.string()),
        ("method", pa.string()),
        ("values", pa.string()),
        ("count", pa.int64()),
        ("subset", pa.int64()),
        ("experts", pa.list_(pa.string())),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("chosen", pa.bool_()),
        ("split", pa.string()),
        ("side", pa.string()),
        ("category", pa.string()),
        ("task", pa.string()),
        ("score", pa.float64()),
        ("items", pa.int64()),
        ("model", pa.string()),
        ("digest", pa.string()),
    ]
)
"""The columns of `score_table`; `mergeloom.results` says what each holds."""


def score_table(plan: Plan, sweep: Sweep) -> pa.Table:
    """Return the scores of `sweep` as a table with the columns of SCHEMA, cells in the order of the plan."""
    rows = list(_rows(plan, sweep))
    return pa.table({name: [row[name] for row in rows] for name in SCHEMA.names}, schema=SCHEMA)


def _rows(plan: Plan, sweep: Sweep) -> Iterator[dict[str, Any]]:
    categories = _categories(sweep.suite)
    scores = {cell.cell: cell for cell in sweep.cells}
    for planned in plan.cells:
        cell = scores[planned.id]
        if planned.refused:
            yield _row(sweep, cell, None, None) | {"side": None, "category": None}
        for split in plan.splits:
            for task in planned.tasks_on(split):
                side, category = categories[task]
                yield _row(sweep, cell, split, task) | {"side": side, "category": category}


def _row(sweep: Sweep, cell: CellScores, split: Split | None, task: str | None) -> dict[str, Any]:
    names = ("cell", "kind", "name", "method", "count", "subset", "status", "reason", "chosen", "model", "digest")
    items = cell.items.get(split, {}).get(task) if split and task else None
    return {
        **{name: getattr(cell, name) for name in names},
        "sweep": sweep.name,
        "values": json_text(cell.values),
        "experts": list(cell.experts),
        "split": split,
        "task": task,
        "score": None if items is None else float(shown(sweep.scales.get(str(task), "mean"), items.mean())),
        "items": 0 if items is None else len(items),
    }


def _categories(suite: Suite) -> dict[str, tuple[str, str]]:
    """Task → side and category; the first where a task stands in several."""
    categories: dict[str, tuple[str, str]] = {}
    for side, groups in (("held_in", suite.held_in), ("held_out", suite.held_out)):
        for category, tasks in groups.items():
            for task in tasks:
                categories.setdefault(task, (side, category))
    return categories

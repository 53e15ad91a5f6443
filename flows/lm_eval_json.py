"""The sweep's evaluations as lm-eval's own results files, for tools that read those."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pyarrow import parquet

from flows.session.session import Session
from mergecore.errors import EvaluationError
from mergecore.evaluators.lm_results import results_json
from mergecore.store.results import ITEMS
from mergecore.store.store import write_json


def exported(session: Session, folder: Path) -> list[Path]:
    """Write `folder`/<cell>/results_<split>.json for each measured cell and split. Return the paths.

    Raises EvaluationError where the sweep was not scored by lm-eval.
    """
    plan, frontier = session.plan, session.frontier
    if plan.evaluators["test"].name != "lm_eval":
        raise EvaluationError(f"this sweep was scored by '{plan.evaluators['test'].name}', not by lm-eval")
    written = []
    for cell in plan.cells:
        for split in plan.splits:
            joined: dict[str, Any] = {}
            for task in cell.tasks_on(split):
                step = plan.evaluation(cell, split, task)
                if not frontier.view.done(step):
                    continue
                table = parquet.read_table(session.store.folder(step) / ITEMS)
                for key, value in results_json(table, plan.tasks[split][task]).items():
                    joined[key] = {**joined.get(key, {}), **value} if isinstance(value, dict) else value
            if joined:
                path = folder / re.sub(r"[^\w.=-]+", "_", cell.name) / f"results_{split}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, {**joined, "model_name": cell.name, "lineage": cell.model.as_json()})
                written.append(path)
    return written

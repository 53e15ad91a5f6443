"""What lm-eval's metrics say, item by item as a table, and summed up in lm-eval's own results format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mergecore.errors import EvaluationError, NonFiniteError
from mergecore.evaluators.lm_prepared import PreparedDocument
from mergecore.plugins.evaluator import TaskIdentity

_COLUMNS = ("item", "document", "target", "prediction", "score", "loglikelihoods")


def row(task: Any, document: PreparedDocument, responses: list[Any], identity: TaskIdentity) -> dict[str, Any]:
    """One item's line of the table."""
    metrics = {name: _number(value) for name, value in task.process_results(document.document, responses).items()}
    score = metrics.get(identity.metric)
    if score is None:
        known = ", ".join(name for name, value in metrics.items() if value is not None)
        raise EvaluationError(
            f"task '{identity.task}': '{identity.metric}' has no number per item; name one of: {known}"
        )
    chosen, prediction = _prediction(task, document, responses)
    if prediction is not None and any(math.isnan(value) for value in prediction):
        raise NonFiniteError(f"task '{identity.task}', item {document.item}: the model gives NaN log-likelihoods")
    fixed = (document.item, document.digest, document.target, chosen, score, prediction)
    taken = (*_COLUMNS, identity.metric)
    others = {name: value for name, value in metrics.items() if value is not None and name not in taken}
    return {**dict(zip(_COLUMNS, fixed, strict=True)), **others}


def _prediction(task: Any, document: PreparedDocument, responses: list[Any]) -> tuple[str, list[float] | None]:
    if task.OUTPUT_TYPE == "multiple_choice":
        values = [float(value) for value, _ in responses]
        return document.choices[int(np.argmax(values[: len(document.choices)]))], values
    if task.OUTPUT_TYPE == "loglikelihood":
        return (document.target if responses[0][1] else ""), [float(responses[0][0])]
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return "", [float(responses[0])]
    return str(responses[0]), None


def _number(value: Any) -> float | None:
    """A metric's number for one item; a rolling log-likelihood per word or byte; None for what only a whole task
    has.
    """
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], float) and isinstance(value[1], int):
        return value[0] / value[1]
    return float(value) if isinstance(value, bool | int | float | np.number | np.bool_) else None


def table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The rows of a task as one table; metrics that only some tasks have are float64 columns at the end."""
    numbers = [name for name in rows[0] if name not in _COLUMNS]
    types = (pa.int64(), pa.string(), pa.string(), pa.string(), pa.float64(), pa.list_(pa.float64()))
    schema = [*zip(_COLUMNS, types, strict=True), *((name, pa.float64()) for name in numbers)]
    return pa.Table.from_pylist(list(rows), schema=pa.schema(schema))


def results_json(table: pa.Table, task: TaskIdentity) -> dict[str, Any]:
    """The task's scores in the format of lm-eval's own results files (`results`, `configs`, `versions`, `n-shot` …).

    Standard errors are those of the mean (sample standard deviation over the root of the number of items).
    """
    names = list(dict.fromkeys([task.metric, *table.column_names]))
    results: dict[str, Any] = {"alias": task.task}
    for name in names:
        if name in _COLUMNS:
            continue
        values = table["score" if name == task.metric else name].to_numpy()
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else "N/A"
        results |= {f"{name},none": float(values.mean()), f"{name}_stderr,none": error}
    config = task.identity["config"]
    evaluator = task.identity["evaluator"]
    return {
        "results": {task.task: results},
        "group_subtasks": {task.task: []},
        "configs": {task.task: {"task": task.task, **config}},
        "versions": {task.task: (config.get("metadata") or {}).get("version", "Yaml")},
        "n-shot": {task.task: config["num_fewshot"]},
        "higher_is_better": {
            task.task: {
                name.split(",")[0]: True for name in results if name.endswith(",none") and "_stderr," not in name
            }
        },
        "n-samples": {task.task: {"original": task.identity["documents"], "effective": len(table)}},
        "config": {
            "batch_size": evaluator["batch_size"],
            "model_dtype": f"torch.{evaluator['dtype']}",
            "limit": evaluator["limit"],
            **{f"{kind}_seed": evaluator["seed"] for kind in ("random", "numpy", "torch", "fewshot")},
        },
        "lm_eval_version": task.identity["lm_eval"],
    }

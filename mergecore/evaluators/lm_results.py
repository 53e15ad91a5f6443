"""What lm-eval's metrics say, item by item as a table, and summed up in lm-eval's own results format.

Every metric is summed up by the task's own aggregation, for each of its filters, while the task is at hand. The numbers
lie in the metadata of the table: aggregations may need more than a number per item (texts, pairs of counts).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mergecore.errors import EvaluationError, NonFiniteError
from mergecore.evaluators.lm_prepared import PreparedDocument
from mergecore.plugins.evaluator import TaskIdentity

_COLUMNS = ("item", "document", "target", "prediction", "score", "loglikelihoods")
_SUMMED = b"lm_eval"
"""The key of the metadata: `metrics` by 'metric,filter', and `higher_is_better` by metric."""

Metrics = Mapping[str, Sequence[Mapping[str, Any]]]
"""Filter → for each item its metrics, as lm-eval's `process_results` gives them."""


def scored_table(
    task: Any, documents: Sequence[PreparedDocument], instances: Sequence[Sequence[Any]], identity: TaskIdentity
) -> pa.Table:
    """Return one row per item, from lm-eval's task and its requests with filtered responses.

    score: the primary metric, higher is better. Further float64 columns hold every other metric that has a number per
    item: 'metric' of the primary filter, 'metric,filter' of another. Raises EvaluationError where the primary metric
    has none, NonFiniteError where a log-likelihood is NaN.
    """
    filters = list(instances[0][0].filtered_resps)
    primary, _, chosen = identity.metric.partition(",")
    chosen = chosen or filters[0]
    if chosen not in filters:
        raise EvaluationError(f"task '{identity.task}' has no filter '{chosen}'; it has: {', '.join(filters)}")
    responses = {
        name: [[request.filtered_resps[name] for request in requests] for requests in instances] for name in filters
    }
    metrics = {
        name: [
            task.process_results(document.document, own)
            for document, own in zip(documents, responses[name], strict=True)
        ]
        for name in filters
    }
    scores = _scores([item.get(primary) for item in metrics[chosen]], metrics[chosen][0], identity)
    rows = []
    for number, document in enumerate(documents):
        text, likelihoods = _prediction(task, document, responses[chosen][number])
        if likelihoods is not None and any(math.isnan(value) for value in likelihoods):
            raise NonFiniteError(f"task '{identity.task}', item {document.item}: the model gives NaN log-likelihoods")
        fixed = (document.item, document.digest, document.target, text, scores[number], likelihoods)
        others = {
            metric if name == chosen else f"{metric},{name}": _number(value)
            for name in filters
            for metric, value in metrics[name][number].items()
            if (metric, name) != (primary, chosen)
        }
        rows.append({**others, **dict(zip(_COLUMNS, fixed, strict=True))})
    return _table(rows).replace_schema_metadata({_SUMMED: json.dumps(_summed(task, metrics)).encode()})


def _scores(values: Sequence[Any], first: Mapping[str, Any], identity: TaskIdentity) -> list[float]:
    """Return the primary metric of each item, higher is better. Raises EvaluationError where an item has no number.

    Log-likelihoods per word or byte are divided by the words or bytes of the mean item: so their mean is that of all
    words or bytes, as lm-eval weighs them.
    """
    if "weights" in identity.identity:
        total = sum(weight for _, weight in values)
        return [float(value) * len(values) / total for value, _ in values]
    numbers = [_number(value) for value in values]
    if None in numbers:
        known = ", ".join(name for name, value in first.items() if _number(value) is not None)
        raise EvaluationError(
            f"task '{identity.task}': '{identity.metric}' has no number per item; name one of: {known}"
        )
    return [-(number or 0.0) if identity.scale == "error" else (number or 0.0) for number in numbers]


def _prediction(task: Any, document: PreparedDocument, responses: list[Any]) -> tuple[str, list[float] | None]:
    if task.OUTPUT_TYPE == "multiple_choice":
        values = [float(value) for value, _ in responses]
        return document.choices[int(np.argmax(values[: len(document.choices)]))], values
    if task.OUTPUT_TYPE == "loglikelihood":
        return (document.target if responses[0][1] else ""), [float(responses[0][0])]
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return "", [float(responses[0])]
    return str(responses[0]), None


def _is_weighted(value: Any) -> bool:
    """Return whether a metric of one item is a log-likelihood with its number of words or bytes."""
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], float) and isinstance(value[1], int)


def _number(value: Any) -> float | None:
    """Return a metric's number for one item; a rolling log-likelihood per word or byte; None for what only a whole task
    has.
    """
    if _is_weighted(value):
        return float(value[0] / value[1])
    return float(value) if isinstance(value, bool | int | float | np.number | np.bool_) else None


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The rows of a task as one table; further metrics are float64 columns at the end, null for an item without."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if value is not None)
    types = (pa.int64(), pa.string(), pa.string(), pa.string(), pa.float64(), pa.list_(pa.float64()))
    schema = [*zip(_COLUMNS, types, strict=True), *((name, pa.float64()) for name in names if name not in _COLUMNS)]
    return pa.Table.from_pylist(list(rows), schema=pa.schema(schema))


def _summed(task: Any, metrics: Metrics) -> dict[str, Any]:
    """Return every metric of every filter, summed up by the task's own aggregation, with lm-eval's directions.

    A standard error is that of the mean (lm-eval's closed forms); of other aggregations lm-eval draws a bootstrap, and
    'N/A' stands here. A metric whose aggregation fails is left out.
    """
    from lm_eval.api.metrics import acc_all, acc_all_stderr, mean, mean_stderr

    errors = {mean: mean_stderr, acc_all: acc_all_stderr}
    summed: dict[str, Any] = {}
    for name, items in metrics.items():
        for metric in dict.fromkeys(metric for item in items for metric in item):
            values = [item[metric] for item in items if metric in item]
            aggregation = task.aggregation().get(metric, mean)
            try:
                summed[f"{metric},{name}"] = float(aggregation(values))
            except Exception:
                continue
            error = errors.get(aggregation)
            summed[f"{metric}_stderr,{name}"] = float(error(values)) if error and len(values) > 1 else "N/A"
    return {"metrics": summed, "higher_is_better": dict(task.higher_is_better())}


def _summed_before(table: pa.Table, task: TaskIdentity) -> dict[str, Any]:
    """Return the same from a table without metadata, as version 0.1.0 wrote them: metrics of the first filter, and of
    those only what a mean over items gives.
    """
    listed = task.identity["config"].get("filter_list") or [{"name": "none"}]
    name, better = listed[0]["name"], dict[str, bool]()
    summed: dict[str, float | str] = {}
    for metric in dict.fromkeys([task.metric, *table.column_names]):
        if metric in _COLUMNS:
            continue
        values = table["score" if metric == task.metric else metric].to_numpy()
        better[metric] = metric != "perplexity"
        error: float | str = (
            float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 and better[metric] else "N/A"
        )
        summed[f"{metric},{name}"] = float(values.mean()) if better[metric] else math.exp(-values.mean())
        summed[f"{metric}_stderr,{name}"] = error
    return {"metrics": summed, "higher_is_better": better}


def results_json(table: pa.Table, task: TaskIdentity) -> dict[str, Any]:
    """Return the task's scores in the format of lm-eval's own results files (`results`, `configs`, `versions`, …)."""
    written = (table.schema.metadata or {}).get(_SUMMED)
    summed = json.loads(written) if written else _summed_before(table, task)
    config, evaluator = task.identity["config"], task.identity["evaluator"]
    return {
        "results": {task.task: {"name": task.task, "alias": task.task, "sample_len": len(table), **summed["metrics"]}},
        "group_subtasks": {task.task: []},
        "configs": {task.task: {"task": task.task, **config}},
        "versions": {task.task: (config.get("metadata") or {}).get("version", "Yaml")},
        "n-shot": {task.task: config["num_fewshot"]},
        "higher_is_better": {task.task: summed["higher_is_better"]},
        "n-samples": {task.task: {"original": task.identity["documents"], "effective": len(table)}},
        "config": {
            "batch_size": evaluator["batch_size"],
            "model_dtype": f"torch.{evaluator['dtype']}",
            "limit": evaluator["limit"],
            **{f"{kind}_seed": evaluator["seed"] for kind in ("random", "numpy", "torch", "fewshot")},
        },
        "lm_eval_version": task.identity["lm_eval"],
    }

"""Ready-made MLflow pages of a sweep: a leaderboard, its curves, and charts of its cells.

MLflow keeps a saved view in an experiment tag `mlflow.sharedViewState.<key>`: JSON around a deflated state of the page.
The format is not documented (seen in MLflow 3.17), so whoever saves views must live with their absence.
"""

from __future__ import annotations

import base64
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.tracking.records import CURRENT, KIND, STATE

PREFIX = "mlflow.sharedViewState."
LEADERBOARD, CURVES, CHARTS = "mergeloom-leaderboard", "mergeloom-curves", "mergeloom-charts"
TITLES = {LEADERBOARD: "Leaderboard", CURVES: "Method × number of experts", CHARTS: "Held-in against held-out"}
PACKED = "deflate;"


def _page(kind: str, columns: Mapping[str, int], order: str, charts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the state of a page that lists the runs of one kind, sorted by a metric so that nested runs have rows.

    columns: column → width in pixels, in the order of the page. order: the metric.
    """
    widths = {"attributes.`Run Name`": 200, "runDateAndNestInfo": 130, **columns}
    return {
        "startTime": "ALL", "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs",
        "searchFilter": f"tags.`{KIND}` = '{kind}' and tags.`{STATE}` = '{CURRENT}'",
        "orderByKey": f"metrics.`{order}`", "orderByAsc": False,
        "selectedColumns": list(columns), "columnOrder": list(widths), "columnWidths": widths,
        "runsHiddenMode": "SHOWALL", "viewMaximized": False, "runListHidden": False,
        "isAccordionReordered": True,  # without it MLflow adds a chart for every metric
        "useGroupedValuesInCharts": True, "hideEmptyCharts": False, "groupBy": None, "groupsExpanded": {},
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
        "compareRunSections": [_section(name) for name in dict.fromkeys(chart["metricSectionId"] for chart in charts)],
        "compareRunCharts": list(charts),
    }  # fmt: skip


SECTIONS = {
    "curves": ("Step = number of experts", 2),
    "cells": ("Each cell", 2),
    "wide": ("Method to scores", 1),  # its labels need the width of the page
}


def _section(name: str) -> dict[str, Any]:
    title, columns = SECTIONS[name]
    shown = {"display": True, "isReordered": False, "deleted": False, "isGenerated": False}
    return {"uuid": name, "name": title, "columns": columns, "cardHeight": 420, **shown}


def _chart(section: str, uuid: str, kind: str, title: str, **settings: Any) -> dict[str, Any]:
    common = {"metricSectionId": section, "runsCountToCompare": 100, "deleted": False, "isGenerated": False}
    return {"uuid": uuid, "type": kind, "displayName": title, **common, **settings}


def _line(uuid: str, metric: str, title: str) -> dict[str, Any]:
    return _chart(
        "curves", uuid, "LINE", title, metricKey=metric, selectedMetricKeys=[metric], xAxisKey="step",
        scaleType="linear", xAxisScaleType="linear", selectedXAxisMetricKey="", lineSmoothness=0, displayPoints=True,
        yAxisKey="metric",
        selectedYAxisMetricKey="metric", yAxisExpressions=[], range={}, useGlobalXaxisKey=False,
    )  # fmt: skip


def _scatter(uuid: str, title: str, across: str, up: str) -> dict[str, Any]:
    axes = {"xaxis": {"key": across, "type": "METRIC"}, "yaxis": {"key": up, "type": "METRIC"}}
    return _chart("cells", uuid, "SCATTER", title, **axes)


def view_states(select_by: str, params: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return key → state of each view. select_by: 'held_in' or 'held_out'. params: the parameters that cells have."""
    headline = f"{select_by}/avg"
    scores = ["held_in/avg", "held_out/avg"]
    shown = {"params.`method`": 125, "params.`n_experts`": 85}
    columns = shown | {f"metrics.`{name}`": 105 for name in scores} | {"params.`values`": 240}
    columns |= {"params.`subset`": 70, "tags.`cell.status`": 90, "tags.`cell.reason`": 300}
    across = [name for name in ("method", "n_experts") if name in params]
    parallel = _chart(
        "wide", "c3", "PARALLEL", "method · number of experts → held-in, held-out", selectedParams=across,
        selectedMetrics=scores, showAllRuns=True,
    )  # fmt: skip
    return {
        LEADERBOARD: _page("cell", columns, headline, []),
        CURVES: _page(
            "series",
            {"params.`method`": 140, "params.`values`": 240},
            headline,
            [_line("l1", "held_in/avg", "held-in"), _line("l2", "held_out/avg", "held-out")],
        ),
        CHARTS: _page(
            "cell",
            shown,
            headline,
            [
                _scatter("c1", "held-in against held-out", "held_in/avg", "held_out/avg"),
                _scatter("c2", "held-in by number of experts", "n_experts", "held_in/avg"),
                parallel,
            ],
        ),
    }


def packed(key: str, state: Mapping[str, Any], now: float | None = None) -> str:
    """Return the value of the experiment tag of a view. now: seconds since the epoch."""
    milliseconds = int((time.time() if now is None else now) * 1000)
    text = PACKED + base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    return json.dumps({"name": TITLES[key], "createdAt": milliseconds, "updatedAt": milliseconds, "state": text})


def is_saved(value: str | None, key: str, state: Mapping[str, Any]) -> bool:
    """Whether a tag's value is this view, whenever it was saved."""
    try:
        saved = json.loads(value or "")
        text = saved["state"].removeprefix(PACKED)
        return bool(saved["name"] == TITLES[key] and json.loads(zlib.decompress(base64.b64decode(text))) == state)
    except (ValueError, KeyError, TypeError, AttributeError, zlib.error):
        return False


def page(experiment_id: str, key: str | None = None) -> str:
    """Return the address, after that of the server, of the page with an experiment's runs. key: of a saved view.

    Without `workflowType` MLflow would open it on traces.
    """
    view = f"&viewStateShareKey={key}" if key else ""
    mode = "&compareRunsMode=CHART" if key in (CURVES, CHARTS) else ""
    return f"#/experiments/{experiment_id}/runs?workflowType=machine_learning{view}{mode}"
